#include "engine_fault.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

namespace offload_opt {
namespace {

using Clock = std::chrono::steady_clock;

class FaultEngine final : public IoEngine {
 public:
  FaultEngine(std::unique_ptr<IoEngine> inner, const FaultPlan& plan)
      : inner_(std::move(inner)), plan_(plan), random_(plan.seed), arrived_(inner_->capabilities().depth) {}

  unsigned submit(std::span<const IoRequest> requests) override {
    unsigned taken = 0;
    for (const IoRequest& request : requests) {
      const std::size_t in_flight = late_.size() + forwarded_ + held_.size() + ready_.size();
      if (in_flight >= arrived_.size() || (in_flight > 0 && chance(plan_.full))) break;
      if (const int error = draw_error(request)) {
        complete({request.tag, -error});
      } else {
        IoRequest part = request;
        if (part.length > 1 && chance(plan_.short_transfer)) part.length = draw_short_length(part.length);
        if (chance(plan_.late) || !forward(part)) late_.push_back(part);
      }
      ++taken;
    }
    return taken;
  }

  // The inner engine may start what it has taken only in its own reap(), so that is called first, and before any sleep.
  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    start_late();
    collect(0);
    for (Held& held : held_) held.reaps -= held.reaps > 0 ? 1 : 0;
    let_go_of_due();
    while (ready_.size() < min) {
      if (forwarded_ > 0) {
        collect(1);
        start_late();
      } else {
        let_go_of_next();
      }
    }
    if (chance(plan_.shuffled)) std::shuffle(ready_.begin(), ready_.end(), random_);
    const auto count = static_cast<unsigned>(std::min(ready_.size(), completions.size()));
    std::copy_n(ready_.begin(), count, completions.begin());
    ready_.erase(ready_.begin(), ready_.begin() + count);
    return count;
  }

  EngineCapabilities capabilities() const override { return inner_->capabilities(); }

 private:
  // A completion that is held back until it has been passed over by `reaps` calls of reap() and `until` has come.
  struct Held {
    IoCompletion completion;
    unsigned reaps;
    Clock::time_point until;
  };

  bool chance(double probability) { return std::uniform_real_distribution<>(0, 1)(random_) < probability; }
  unsigned draw(unsigned low, unsigned high) { return std::uniform_int_distribution<unsigned>(low, high)(random_); }

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
    return unit == length ? length : unit * draw(1, length / unit - 1);
  }

  bool forward(const IoRequest& request) {
    const unsigned taken = inner_->submit({&request, 1});
    forwarded_ += taken;
    return taken == 1;
  }

  void start_late() {
    std::erase_if(late_, [this](const IoRequest& request) { return forward(request); });
  }

  void collect(unsigned min) {
    if (forwarded_ == 0) return;
    const unsigned count = inner_->reap(min, arrived_);
    forwarded_ -= count;
    for (unsigned i = 0; i < count; ++i) complete(arrived_[i]);
  }

  void complete(const IoCompletion& completion) {
    if (!chance(plan_.delayed)) {
      ready_.push_back(completion);
    } else if (chance(0.5)) {
      held_.push_back({completion, draw(1, 8), Clock::time_point::min()});
    } else {
      held_.push_back({completion, 0, Clock::now() + std::chrono::microseconds(draw(1, 300))});
    }
  }

  void let_go_of_due() {
    const Clock::time_point now = Clock::now();
    std::erase_if(held_, [&](const Held& held) {
      const bool due = held.reaps == 0 && held.until <= now;
      if (due) ready_.push_back(held.completion);
      return due;
    });
  }

  // With nothing else under way, whoever waits is waiting for what is held.
  void let_go_of_next() {
    if (held_.empty()) {
      start_late();
      return;
    }
    const auto next =
        std::min_element(held_.begin(), held_.end(), [](const Held& a, const Held& b) { return a.until < b.until; });
    std::this_thread::sleep_until(next->until);
    ready_.push_back(next->completion);
    held_.erase(next);
  }

  std::unique_ptr<IoEngine> inner_;
  const FaultPlan plan_;
  std::mt19937_64 random_;
  std::vector<IoRequest> late_;        // taken and not yet forwarded
  unsigned forwarded_ = 0;             // in flight in the inner engine
  std::vector<IoCompletion> arrived_;  // room for what the inner engine hands over: its depth
  std::vector<Held> held_;
  std::vector<IoCompletion> ready_;
};

}  // namespace

std::unique_ptr<IoEngine> make_fault_engine(std::unique_ptr<IoEngine> inner, const FaultPlan& plan) {
  return std::make_unique<FaultEngine>(std::move(inner), plan);
}

}  // namespace offload_opt
