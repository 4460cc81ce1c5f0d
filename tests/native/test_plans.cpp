// Seeded fault plans. A plan draws everything: the engine, the handle's settings, the faults and their chances (none,
// too), and rounds of operations on several files and buffers, many of them pending at once on ranges that do not
// overlap, some behind others. What came of them is held against a model: each operation moved exactly its bytes, or
// failed with an error that the plan can inject; no other byte of a file or of memory has changed; each operation ended
// once; and the handle goes on working.
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <future>
#include <iostream>
#include <mutex>
#include <system_error>
#include <thread>

#include "engine_fault.h"
#include "player.h"
#include "support.h"

namespace offload_opt {
namespace {

constexpr std::chrono::seconds kPatience{60};

Settings draw_settings(Draw& draw) {
  static const std::vector<const EngineEntry*> engines = working_engines();  // probed once: a probe takes its time
  Settings settings{};
  settings.engine = engines.at(draw.between(0, engines.size() - 1));
  HandleConfig& config = settings.config;
  config.block_size = draw.chance(0.5) ? 4096 * draw.between(1, 16) : draw.between(1, draw.chance(0.1) ? 600 : 40'000);
  config.queue_depth = static_cast<unsigned>(draw.chance(0.2) ? 1 : draw.between(1, 24));
  config.num_threads = static_cast<unsigned>(draw.chance(0.5) ? 1 : draw.between(2, 4));
  config.single_submit = draw.chance(0.3);
  config.overlap_events = draw.chance(0.7);
  config.registered = draw.chance(0.7);
  FaultPlan& faults = settings.faults;
  faults.seed = draw.random();
  faults.short_transfer = draw.fault(0.5);
  faults.interrupted = draw.fault(0.15);
  faults.again = draw.fault(0.15);
  faults.io_error = draw.fault(draw.chance(0.5) ? 0.01 : 0.1);
  faults.no_space = draw.fault(draw.chance(0.5) ? 0.01 : 0.1);
  faults.full = draw.fault(0.5);
  faults.late = draw.fault(0.5);
  faults.delayed = draw.fault(0.5);
  faults.shuffled = draw.fault(1);
  return settings;
}

// What all processes together may take of fs.aio-max-nr may be gone for a moment: that is no fault of the plan.
std::unique_ptr<IoEngine> make_engine(const EngineEntry& entry, unsigned depth) {
  for (int tries = 0;; ++tries) {
    try {
      return entry.make(depth);
    } catch (const std::system_error& error) {
      if (error.code().value() != EAGAIN || tries == 1000) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
}

Totals run_plan(const Settings& settings, Draw& draw, const Folders& folders) {
  std::atomic<std::uint64_t> engines{0};
  AioHandle handle(settings.config, [&](unsigned depth) {
    FaultPlan faults = settings.faults;
    faults.seed += engines++;
    return make_fault_engine(make_engine(*settings.engine, depth), faults);
  });
  const bool alone = draw.chance(0.75);
  Player player(handle, settings, folders, draw.random(), alone);
  Totals totals;
  if (alone) {
    player.play();
  } else {
    Player other(handle, settings, folders, draw.random(), alone);
    auto others = std::async(std::launch::async, [&] { other.play(); });
    player.play();
    others.get();
    player.counted += other.counted;
    totals = other.totals;
  }
  if (draw.chance(0.3)) player.play_last();
  CHECK(handle.wait_for_all(std::chrono::milliseconds(0)));
  CHECK(handle.finish_all() == player.counted);
  return {totals.operations + player.totals.operations, totals.failed + player.totals.failed,
          totals.cancelled + player.totals.cancelled};
}

// Ends the process when a plan hangs.
class Watchdog {
 public:
  Watchdog() : thread_([this] { watch(); }) {}
  ~Watchdog() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  // Something is alive; `what` is to be printed if nothing is heard for too long from here on.
  void begin(const std::string& what) {
    std::lock_guard lock(mutex_);
    ++begun_;
    what_ = what;
  }

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      const std::uint64_t before = begun_;
      changed_.wait_for(lock, kPatience, [this] { return stopping_; });
      if (stopping_ || begun_ != before) continue;
      std::cerr << "HANGS " << what_ << std::endl;
      std::abort();
    }
  }

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::uint64_t begun_ = 0;
  std::string what_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace

bool run_plans(const Folders& folders, std::uint64_t first, std::uint64_t count, const std::string& command) {
  Watchdog watchdog;
  Totals totals;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    Draw draw(seed);
    const Settings settings = draw_settings(draw);
    const std::string what = "plan " + std::to_string(seed) + "; repeat it with: " + command + " " +
                             std::to_string(seed) + " 1\n      " + settings.text();
    watchdog.begin(what);
    try {
      const Totals plan = run_plan(settings, draw, folders);
      totals.operations += plan.operations;
      totals.failed += plan.failed;
      totals.cancelled += plan.cancelled;
    } catch (const std::exception& error) {
      std::cout << "FAIL  " << what << "\n      " << error.what() << std::endl;
      return false;
    }
  }
  std::cout << count << " plans held: " << totals.operations << " operations, of which "
            << totals.failed - totals.cancelled << " met an error and " << totals.cancelled << " were called off"
            << std::endl;
  // Many plans in which nothing fails, or all, have tested nothing.
  return count < 100 || (totals.failed > totals.cancelled && totals.failed < totals.operations / 2);
}

}  // namespace offload_opt
