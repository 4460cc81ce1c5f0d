// Adam's loop under the sanitizers, against the codecs' loops before and after one over exact values.
#include <algorithm>
#include <memory>
#include <vector>

#include "adam.h"
#include "support.h"

namespace offload_opt {
namespace {

// Memory of exactly this size, so that a byte too far is found.
template <typename T>
std::unique_ptr<T[]> exactly(std::size_t count) {
  return std::make_unique<T[]>(count);
}

// A parameter of bf16 with its gradient, and its state in int8.
struct Stored {
  explicit Stored(std::size_t numel) : count(numel), blocks((numel + kInt8Block - 1) / kInt8Block) {
    codes[0] = exactly<std::uint8_t>(count);
    codes[1] = exactly<std::uint8_t>(count);
    exponents[0] = exactly<std::uint8_t>(blocks);
    exponents[1] = exactly<std::uint8_t>(blocks);
    for (auto* const bf16 : {&weight, &remainder, &gradient}) *bf16 = exactly<std::uint16_t>(count);
  }

  Stored(std::mt19937_64& random, std::size_t numel) : Stored(numel) {
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t bits = random();
      weight[i] = static_cast<std::uint16_t>(0x3F00 + (bits & 0xFF));
      remainder[i] = (bits & 0x700) == 0 ? 0x8000 : static_cast<std::uint16_t>(bits >> 16);
      gradient[i] = static_cast<std::uint16_t>(0x3A00 + ((bits >> 32) & 0x80FF));
      codes[0][i] = static_cast<std::uint8_t>(bits >> 48);
      codes[1][i] = static_cast<std::uint8_t>(bits >> 56);
    }
    std::fill_n(exponents[0].get(), blocks, std::uint8_t{118});
    std::fill_n(exponents[1].get(), blocks, std::uint8_t{100});
  }

  void copy_to(Stored& other) const {
    for (int i : {0, 1}) {
      std::copy_n(codes[i].get(), count, other.codes[i].get());
      std::copy_n(exponents[i].get(), blocks, other.exponents[i].get());
    }
    std::copy_n(weight.get(), count, other.weight.get());
    std::copy_n(remainder.get(), count, other.remainder.get());
    std::copy_n(gradient.get(), count, other.gradient.get());
  }

  bool operator==(const Stored& other) const {
    const auto same = [](const auto& a, const auto& b, std::size_t n) {
      return std::equal(a.get(), a.get() + n, b.get());
    };
    bool is_same = same(weight, other.weight, count) && same(remainder, other.remainder, count);
    for (int i : {0, 1}) {
      is_same = is_same && same(codes[i], other.codes[i], count) && same(exponents[i], other.exponents[i], blocks);
    }
    return is_same;
  }

  // With values in `values`, four times `count`, or none.
  AdamRun run(float* values, const std::vector<std::int32_t>& ties) const {
    const auto at = [&](std::size_t i) { return values == nullptr ? nullptr : values + i * count; };
    return {{Format::kMaster, count, at(0), remainder.get(), weight.get(), 0, ties.data(), ties.size()},
            {Format::kBf16, count, at(1), gradient.get(), gradient.get()},
            {Format::kSigned8, count, at(2), codes[0].get(), exponents[0].get(), 11},
            {Format::kNonNegative8, count, at(3), codes[1].get(), exponents[1].get(), 12}};
  }

  std::size_t count, blocks;
  std::unique_ptr<std::uint8_t[]> codes[2], exponents[2];
  std::unique_ptr<std::uint16_t[]> weight, remainder, gradient;
};

AdamRun exact(const AdamRun& run) {
  const auto as_it_is = [](Coding coding) {
    coding.format = Format::kExact;
    return coding;
  };
  return {as_it_is(run.parameter), as_it_is(run.gradient), as_it_is(run.exp_avg), as_it_is(run.exp_avg_sq)};
}

void update_both_ways(std::mt19937_64& random, std::size_t count) {
  const Stored tiled(random, count);
  Stored whole(count);
  tiled.copy_to(whole);
  const AdamStep step{0.01, 0.9, 0.999, 1e-8, 0.1, count % 2 == 0, count % 3 == 0, 3};
  const std::uint64_t first = random() >> 1;
  std::vector<std::int32_t> ties;
  for (std::size_t i = 0; i < count; i += 3) {
    if (tiled.remainder[i] == 0x8000) ties.push_back(static_cast<std::int32_t>(i));
  }

  LeafHashes hashes(tiled.codes[0].get(), count);
  const auto tiled_ties = adam(tiled.run(nullptr, ties), step, first, 4, &hashes);

  const auto values = exactly<float>(4 * count);
  const AdamRun run = whole.run(values.get(), ties);
  decode({run.parameter, run.gradient, run.exp_avg, run.exp_avg_sq}, 1);
  adam(exact(run), step, first, 1, nullptr);
  const Found found = encode({run.parameter, run.exp_avg, run.exp_avg_sq}, first, 1);
  CHECK(found.coding == 3);
  CHECK(found.ties == tiled_ties);
  CHECK(tiled == whole);
  LeafHashes again(tiled.codes[0].get(), count);
  CHECK(hashes.finish(1) == again.finish(1));
}

}  // namespace

void check_adam(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (std::size_t count = 0; count < 600; count += 37) update_both_ways(random, count);
  for (const std::size_t count : {4096U, 4097U, 65'536U, 100'003U, 300'001U}) update_both_ways(random, count);
}

}  // namespace offload_opt
