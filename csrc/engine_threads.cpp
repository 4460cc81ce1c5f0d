// Threads that call pread() and pwrite(): works on every POSIX system and file system.
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
// Requests that follow one another in the file and in memory go to the kernel in one call of at most this many bytes: a
// call costs two switches of threads, which small requests feel. 256 KiB ones gained a tenth, 64 KiB ones a third.
constexpr std::uint64_t kMaxRun = 1 << 20;

bool follows(const IoRequest& next, const IoRequest& request) {
  return next.fd == request.fd && next.direction == request.direction &&
         next.offset == request.offset + request.length &&
         next.data == static_cast<char*>(request.data) + request.length;
}

// The bytes moved by one pread() or pwrite() of `length` bytes from where `request` starts, or -errno.
std::int64_t transfer(const IoRequest& request, std::uint64_t length) {
  const auto offset = static_cast<off_t>(request.offset);
  const ssize_t moved = request.direction == Direction::kRead ? ::pread(request.fd, request.data, length, offset)
                                                              : ::pwrite(request.fd, request.data, length, offset);
  return moved < 0 ? -errno : moved;
}

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
    become_io_thread();
    std::vector<IoRequest> run;
    std::unique_lock lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::uint64_t length = take(run);
      lock.unlock();
      const std::int64_t res = transfer(run.front(), length);
      lock.lock();
      hand_back(run, res);
      lock.unlock();
      done_cv_.notify_one();  // not under the lock, which the thread that wakes wants
      lock.lock();
    }
  }

  // Moves the first requests of the queue that one call can do into `run`; returns their bytes.
  std::uint64_t take(std::vector<IoRequest>& run) {
    run.clear();
    std::uint64_t length = 0;
    do {
      length += queue_.front().length;
      run.push_back(queue_.front());
      queue_.pop_front();
    } while (!queue_.empty() && follows(queue_.front(), run.back()) && length + queue_.front().length <= kMaxRun);
    return length;
  }

  // Deals out what one call for the whole run gave. The first request gets an error or a zero; those that a short
  // transfer did not reach were not tried, and go back to the front of the queue.
  void hand_back(const std::vector<IoRequest>& run, std::int64_t res) {
    done_.push_back({run.front().tag, std::min<std::int64_t>(res, run.front().length)});
    std::int64_t left = res - run.front().length;
    auto request = run.begin() + 1;
    for (; request != run.end() && left > 0; ++request) {
      done_.push_back({request->tag, std::min<std::int64_t>(left, request->length)});
      left -= request->length;
    }
    queue_.insert(queue_.begin(), request, run.end());
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
