// Threads that call pread() and pwrite(): works on every POSIX system and file system.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "io_engine.h"

namespace offload_opt {
namespace {

// More threads than this gain nothing on any drive that we know, and cost memory and scheduling.
constexpr unsigned kMaxThreads = 16;

class ThreadsEngine final : public IoEngine {
 public:
  // A request more for each thread than it works on: it need not wait for its completion to be reaped to go on.
  explicit ThreadsEngine(unsigned depth) : depth_(depth + std::min(depth, kMaxThreads)) {
    const unsigned count = std::min(depth, kMaxThreads);
    try {
      for (unsigned i = 0; i < count; ++i) threads_.emplace_back([this] { run(); });
    } catch (const std::system_error&) {
      // RLIMIT_NPROC: fewer threads are slower, not wrong. None at all is an error.
      if (threads_.empty()) throw;
    }
  }

  ~ThreadsEngine() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  unsigned submit(std::span<const IoRequest> requests) override {
    unsigned taken = 0;
    {
      std::lock_guard lock(mutex_);
      taken = static_cast<unsigned>(std::min<std::size_t>(requests.size(), depth_ - in_flight_));
      queue_.insert(queue_.end(), requests.begin(), requests.begin() + taken);
      in_flight_ += taken;
    }
    if (taken == 1) {
      work_.notify_one();
    } else if (taken > 1) {
      work_.notify_all();
    }
    return taken;
  }

  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    std::unique_lock lock(mutex_);
    done_cv_.wait(lock, [&] { return done_.size() >= min; });
    const auto count = static_cast<unsigned>(std::min(completions.size(), done_.size()));
    std::copy_n(done_.begin(), count, completions.begin());
    done_.erase(done_.begin(), done_.begin() + count);
    in_flight_ -= count;
    return count;
  }

  EngineCapabilities capabilities() const override { return {depth_}; }

 private:
  void run() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the program's own threads
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const IoRequest request = queue_.front();
      queue_.pop_front();
      lock.unlock();
      const auto offset = static_cast<off_t>(request.offset);
      const ssize_t moved = request.direction == Direction::kRead
                                ? ::pread(request.fd, request.data, request.length, offset)
                                : ::pwrite(request.fd, request.data, request.length, offset);
      const std::int64_t res = moved < 0 ? -errno : moved;
      lock.lock();
      done_.push_back({request.tag, res});
      lock.unlock();
      done_cv_.notify_one();  // not under the lock, which the thread that wakes wants
      lock.lock();
    }
  }

  const unsigned depth_;
  std::mutex mutex_;  // guards everything below but threads_
  std::condition_variable work_;
  std::condition_variable done_cv_;
  std::deque<IoRequest> queue_;
  std::deque<IoCompletion> done_;
  unsigned in_flight_ = 0;  // taken and not yet reaped
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

bool available(std::string&) { return true; }

std::unique_ptr<IoEngine> make(unsigned depth) { return std::make_unique<ThreadsEngine>(depth); }

}  // namespace

const EngineEntry kThreadsEngine = {"threads", available, make};

}  // namespace offload_opt
