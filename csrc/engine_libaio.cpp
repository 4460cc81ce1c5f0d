// Linux's native asynchronous I/O through its raw system calls: no libaio at build or run time.
//
// It is asynchronous for O_DIRECT only: what goes through the page cache is done inside io_submit(), which is right but
// blocks. The kernel bounds the requests of all processes together (fs.aio-max-nr); io_setup() then fails with EAGAIN.
#include "io_engine.h"

#if defined(__linux__) && __has_include(<linux/aio_abi.h>)
#define OFFLOAD_OPT_HAVE_LIBAIO 1
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#endif

namespace offload_opt {
namespace {

#ifdef OFFLOAD_OPT_HAVE_LIBAIO

int io_setup(unsigned depth, aio_context_t* context) {
  return static_cast<int>(::syscall(__NR_io_setup, depth, context));
}

int io_destroy(aio_context_t context) { return static_cast<int>(::syscall(__NR_io_destroy, context)); }

int io_submit(aio_context_t context, std::size_t count, iocb** requests) {
  return static_cast<int>(::syscall(__NR_io_submit, context, static_cast<long>(count), requests));
}

int io_getevents(aio_context_t context, unsigned min, std::size_t max, io_event* events) {
  return static_cast<int>(
      ::syscall(__NR_io_getevents, context, static_cast<long>(min), static_cast<long>(max), events, nullptr));
}

class LibaioEngine final : public IoEngine {
 public:
  explicit LibaioEngine(unsigned depth) : depth_(depth) {
    control_.resize(depth);
    events_.resize(depth);
    tags_.resize(depth);
    for (unsigned slot = depth; slot > 0; --slot) free_.push_back(slot - 1);
    if (io_setup(depth, &context_) != 0) throw std::system_error(errno, std::generic_category(), "io_setup");
  }

  // Waits for what is in flight.
  ~LibaioEngine() override { io_destroy(context_); }

  unsigned submit(std::span<const IoRequest> requests) override {
    const auto taken = static_cast<unsigned>(std::min(requests.size(), free_.size()));
    for (const IoRequest& request : requests.first(taken)) {
      const unsigned slot = free_.back();
      free_.pop_back();
      tags_[slot] = request.tag;
      iocb& control = control_[slot];
      control = {};
      control.aio_data = slot;
      control.aio_lio_opcode = request.direction == Direction::kRead ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE;
      control.aio_fildes = static_cast<std::uint32_t>(request.fd);
      control.aio_buf = reinterpret_cast<std::uint64_t>(request.data);
      control.aio_nbytes = request.length;
      control.aio_offset = static_cast<std::int64_t>(request.offset);
      queued_.push_back(&control);
    }
    start_queued();
    return taken;
  }

  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    start_queued();
    unsigned count = 0;
    while (count < completions.size()) {
      for (; count < completions.size() && !refused_.empty(); refused_.pop_back()) {
        completions[count++] = refused_.back();
      }
      if (in_kernel_ > 0) {
        const int got = io_getevents(context_, min > count ? std::min(min - count, in_kernel_) : 0,
                                     std::min(completions.size() - count, events_.size()), events_.data());
        if (got < 0) {
          // Anything but a signal should not happen, and must not keep a core busy if it does.
          if (errno != EINTR) std::this_thread::sleep_for(std::chrono::milliseconds(10));
          break;
        }
        for (const io_event& event : std::span(events_).first(static_cast<std::size_t>(got))) {
          const auto slot = static_cast<unsigned>(event.data);
          completions[count++] = {tags_[slot], event.res};
          free_.push_back(slot);
        }
        in_kernel_ -= static_cast<unsigned>(got);
      }
      if (count >= min) break;
      // The kernel is short of memory for what is still queued.
      if (in_kernel_ == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      start_queued();
    }
    return count;
  }

  EngineCapabilities capabilities() const override { return {depth_}; }

 private:
  // What the kernel does not take now (EAGAIN) stays queued for the next call; a request that it refuses ends here.
  void start_queued() {
    std::size_t done = 0;
    while (done < queued_.size()) {
      const int taken = io_submit(context_, queued_.size() - done, queued_.data() + done);
      if (taken > 0) {
        done += static_cast<std::size_t>(taken);
        in_kernel_ += static_cast<unsigned>(taken);
      } else if (taken < 0 && errno != EAGAIN && errno != EINTR) {
        const iocb& control = *queued_[done++];
        const auto slot = static_cast<unsigned>(control.aio_data);
        refused_.push_back({tags_[slot], errno == EINVAL ? transfer_here(control) : -errno});
        free_.push_back(slot);
      } else {
        break;
      }
    }
    queued_.erase(queued_.begin(), queued_.begin() + static_cast<std::ptrdiff_t>(done));
  }

  // EINVAL: a kind of file that has no asynchronous I/O, most character devices for example.
  static std::int64_t transfer_here(const iocb& control) {
    const auto fd = static_cast<int>(control.aio_fildes);
    auto* const data = reinterpret_cast<void*>(control.aio_buf);
    const ssize_t moved = control.aio_lio_opcode == IOCB_CMD_PREAD
                              ? ::pread(fd, data, control.aio_nbytes, control.aio_offset)
                              : ::pwrite(fd, data, control.aio_nbytes, control.aio_offset);
    return moved < 0 ? -errno : moved;
  }

  const unsigned depth_;
  aio_context_t context_ = 0;
  unsigned in_kernel_ = 0;
  std::vector<iocb> control_;          // one a slot; the kernel reads it in io_submit() only
  std::vector<std::uint64_t> tags_;    // of the request in the slot
  std::vector<unsigned> free_;         // slots without a request
  std::vector<iocb*> queued_;          // taken, not yet in the kernel; oldest first
  std::vector<IoCompletion> refused_;  // ended by io_submit() itself
  std::vector<io_event> events_;
};

bool available(std::string& why_not) {
  aio_context_t context = 0;
  if (io_setup(1, &context) == 0) {
    io_destroy(context);
    return true;
  }
  why_not = std::string("io_setup: ") + std::strerror(errno);
  if (errno == EAGAIN) why_not += " (all requests of fs.aio-max-nr are taken)";
  return false;
}

std::unique_ptr<IoEngine> make(unsigned depth) { return std::make_unique<LibaioEngine>(depth); }

#else

bool available(std::string& why_not) {
  why_not = "built without libaio (it needs Linux and its headers)";
  return false;
}

std::unique_ptr<IoEngine> make(unsigned) { return nullptr; }

#endif

}  // namespace

const EngineEntry kLibaioEngine = {"libaio", available, make};

}  // namespace offload_opt
