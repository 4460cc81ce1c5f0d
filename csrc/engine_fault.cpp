#include "engine_fault.h"

#include <algorithm>
#include <cerrno>
#include <deque>
#include <random>

namespace offload_opt {
namespace {

class FaultEngine final : public IoEngine {
 public:
  FaultEngine(std::unique_ptr<IoEngine> inner, const FaultPlan& plan)
      : inner_(std::move(inner)), plan_(plan), random_(plan.seed) {}

  unsigned submit(std::span<const IoRequest> requests) override {
    unsigned taken = 0;
    for (IoRequest request : requests) {
      if (held_.size() + forwarded_ >= inner_->capabilities().depth) break;
      if (const int error = draw_error(request)) {
        held_.push_back({request.tag, -error});
      } else {
        if (request.length > 1 && chance(plan_.short_transfer)) request.length = draw_short_length(request.length);
        if (inner_->submit({&request, 1}) == 0) break;
        ++forwarded_;
      }
      ++taken;
    }
    return taken;
  }

  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    const auto count = static_cast<unsigned>(std::min(held_.size(), completions.size()));
    std::copy_n(held_.begin(), count, completions.begin());
    held_.erase(held_.begin(), held_.begin() + count);
    if (forwarded_ == 0) return count;
    const unsigned more = inner_->reap(min > count ? min - count : 0, completions.subspan(count));
    forwarded_ -= more;
    return count + more;
  }

  EngineCapabilities capabilities() const override { return inner_->capabilities(); }

 private:
  bool chance(double probability) { return std::uniform_real_distribution<>(0, 1)(random_) < probability; }

  int draw_error(const IoRequest& request) {
    if (chance(plan_.interrupted)) return EINTR;
    if (chance(plan_.again)) return EAGAIN;
    if (chance(plan_.io_error)) return EIO;
    if (request.direction == Direction::kWrite && chance(plan_.no_space)) return ENOSPC;
    return 0;
  }

  // Direct I/O moves whole sectors, so most short transfers end on one; a request that is not whole sectors ends
  // anywhere.
  std::uint32_t draw_short_length(std::uint32_t length) {
    constexpr std::uint32_t kSector = 512;
    const std::uint32_t unit = length % kSector == 0 && length > kSector ? kSector : 1;
    return unit == length ? length : unit * std::uniform_int_distribution<std::uint32_t>(1, length / unit - 1)(random_);
  }

  std::unique_ptr<IoEngine> inner_;
  const FaultPlan plan_;
  std::mt19937_64 random_;
  std::deque<IoCompletion> held_;
  unsigned forwarded_ = 0;
};

}  // namespace

std::unique_ptr<IoEngine> make_fault_engine(std::unique_ptr<IoEngine> inner, const FaultPlan& plan) {
  return std::make_unique<FaultEngine>(std::move(inner), plan);
}

}  // namespace offload_opt
