// Compiled so that its loop becomes vector instructions (CMakeLists.txt).
#include "adam.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <mutex>

#include "parallel.h"
#include "vectors.h"

namespace offload_opt {
namespace {

// Elements of a tile. Four arrays of them stay in the nearest caches, and what is between the loops does not count.
constexpr std::size_t kTile = 4 * kGranule;
// What a thread takes at most. It is hashed as one, while a cache has it; leaves across its ends are hashed later.
constexpr std::size_t kTurn = 32 * kTile;
static_assert(kTile % kInt8Block == 0 && kTurn % kTile == 0);  // all parts begin with a block

// What of a step is the same for all elements: computed in double and then rounded, as there.
struct Constants {
  explicit Constants(const AdamStep& step)
      : lerp(static_cast<float>(1 - step.beta1)),
        beta2(static_cast<float>(step.beta2)),
        rest2(static_cast<float>(1 - step.beta2)),
        eps(static_cast<float>(step.eps)),
        decay(static_cast<float>(step.is_decoupled ? 1 - step.lr * step.weight_decay : step.weight_decay)),
        step_size(static_cast<float>(-(step.lr / (1 - std::pow(step.beta1, step.step))))),
        correction(static_cast<float>(std::sqrt(1 - std::pow(step.beta2, step.step)))) {}

  float lerp, beta2, rest2, eps, decay, step_size, correction;
};

enum class Decay : std::uint8_t { kNone, kDecoupled, kGradient };

template <Decay decay, bool is_maximizing>
OFFLOAD_OPT_INLINE inline void update(const Constants& step, float* __restrict__ parameter,
                                      const float* __restrict__ gradient, float* __restrict__ exp_avg,
                                      float* __restrict__ exp_avg_sq, std::size_t count) {
  const auto [lerp, beta2, rest2, eps, decay_by, step_size, correction] = step;
  // The average is a linear interpolation from the nearer end.
  const bool is_near = std::fabs(lerp) < 0.5F;
  const float coefficient = is_near ? lerp : lerp - 1;
  for (std::size_t i = 0; i < count; ++i) {
    float g = is_maximizing ? -gradient[i] : gradient[i];
    float p = parameter[i];
    if constexpr (decay == Decay::kDecoupled) p = p * decay_by;
    if constexpr (decay == Decay::kGradient) g = __builtin_fmaf(p, decay_by, g);
    const float m = __builtin_fmaf(coefficient, g - exp_avg[i], is_near ? exp_avg[i] : g);
    const float v = __builtin_fmaf(rest2 * g, g, exp_avg_sq[i] * beta2);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    parameter[i] = p + step_size * m / (std::sqrt(v) / correction + eps);
  }
}

using Update = void (*)(const Constants&, float*, const float*, float*, float*, std::size_t);

template <Decay decay, bool is_maximizing>
void vectorised_update(const Constants& step, float* parameter, const float* gradient, float* exp_avg,
                       float* exp_avg_sq, std::size_t count) {
  vectorised([&]() OFFLOAD_OPT_INLINE {
    update<decay, is_maximizing>(step, parameter, gradient, exp_avg, exp_avg_sq, count);
  });
}

Update update_for(const AdamStep& step) {
  const auto for_decay = [&]<bool is_maximizing>() -> Update {
    if (step.weight_decay == 0) return vectorised_update<Decay::kNone, is_maximizing>;
    if (step.is_decoupled) return vectorised_update<Decay::kDecoupled, is_maximizing>;
    return vectorised_update<Decay::kGradient, is_maximizing>;
  };
  return step.is_maximizing ? for_decay.operator()<true>() : for_decay.operator()<false>();
}

// One of the run's tensors on one thread, tile by tile.
class Operand {
 public:
  explicit Operand(const Coding& coding) : coding_(coding) {}

  float* load(std::size_t begin, std::size_t end) {
    if (coding_.format == Format::kExact) return coding_.values + begin;
    decode_part(coding_, begin, end, tile_.data());
    return tile_.data();
  }

  void store(std::size_t begin, std::size_t end, std::uint64_t first, std::vector<std::int32_t>& ties) {
    if (coding_.format != Format::kExact) encode_part(coding_, begin, end, first, tile_.data(), ties);
  }

 private:
  const Coding& coding_;
  alignas(64) std::array<float, kTile> tile_;
};

// Elements `begin` to `end` of the run, on this thread.
void update_part(const AdamRun& run, const Constants& step, Update update, std::size_t begin, std::size_t end,
                 std::uint64_t first, LeafHashes* hashes, std::vector<std::int32_t>& ties) {
  Operand parameter(run.parameter), gradient(run.gradient), exp_avg(run.exp_avg), exp_avg_sq(run.exp_avg_sq);
  for (std::size_t start = begin; start < end; start += kTile) {
    const std::size_t stop = std::min(start + kTile, end);
    update(step, parameter.load(start, stop), gradient.load(start, stop), exp_avg.load(start, stop),
           exp_avg_sq.load(start, stop), stop - start);
    for (Operand* const operand : {&parameter, &exp_avg, &exp_avg_sq}) operand->store(start, stop, first, ties);
  }
  if (hashes == nullptr) return;
  for (const Coding* const coding : {&run.parameter, &run.exp_avg, &run.exp_avg_sq}) {
    if (coding->format != Format::kExact) hashes->add(stored_part(*coding, begin, end));
  }
}

template <typename T>
void move(T*& pointer, std::uintptr_t by) {
  pointer = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) + by);
}

}  // namespace

AdamRun AdamRun::in_unit(std::uintptr_t data) const {
  AdamRun moved = *this;
  if (parameter.format == Format::kMaster) move(moved.parameter.stored, data);
  for (Coding* const moment : {&moved.exp_avg, &moved.exp_avg_sq}) {
    if (moment->format == Format::kExact) {
      move(moment->values, data);
    } else {
      move(moment->stored, data);
      move(moment->beside, data);
    }
  }
  return moved;
}

std::vector<std::int32_t> adam(const AdamRun& run, const AdamStep& step, std::uint64_t first, unsigned threads,
                               LeafHashes* hashes) {
  const Constants constants(step);
  const Update update = update_for(step);
  std::mutex mutex;
  std::exception_ptr error;
  std::vector<std::int32_t> all_ties;
  in_turns(run.parameter.count, kTile, kTurn, threads, [&](std::size_t begin, std::size_t end) {
    try {
      std::vector<std::int32_t> ties;
      update_part(run, constants, update, begin, end, first, hashes, ties);
      const std::lock_guard lock(mutex);
      insert_ties(all_ties, ties);
    } catch (...) {  // no memory for ties
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
  return all_ties;
}

}  // namespace offload_opt
