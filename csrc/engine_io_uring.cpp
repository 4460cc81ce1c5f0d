// io_uring through its raw system calls: no liburing at build or run time.
//
// The rings are shared with the kernel. Of the submission ring we own the tail and the kernel the head; of the
// completion ring the kernel owns the tail and we the head. Each side publishes its index with a release store.
#include "io_engine.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#define OFFLOAD_OPT_HAVE_IO_URING 1
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace offload_opt {
namespace {

#ifdef OFFLOAD_OPT_HAVE_IO_URING

// The kernel's limit of IORING_MAX_ENTRIES.
constexpr unsigned kMaxEntries = 32768;

int io_uring_setup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(::syscall(__NR_io_uring_setup, entries, params));
}

int io_uring_enter(int fd, unsigned to_submit, unsigned min_complete, unsigned flags) {
  return static_cast<int>(::syscall(__NR_io_uring_enter, fd, to_submit, min_complete, flags, nullptr, 0));
}

int io_uring_register(int fd, unsigned opcode, void* arg, unsigned count) {
  return static_cast<int>(::syscall(__NR_io_uring_register, fd, opcode, arg, count));
}

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A mapping of ring memory. It is kept out of children: a forked process must not touch its parent's rings.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, std::size_t size, std::uint64_t offset) : size_(size) {
    data_ = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, static_cast<off_t>(offset));
    if (data_ == MAP_FAILED) fail("mmap of an io_uring ring");
    ::madvise(data_, size, MADV_DONTFORK);
  }
  Mapping(Mapping&& other) noexcept { *this = std::move(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Mapping() {
    if (data_ != MAP_FAILED) ::munmap(data_, size_);
  }
  template <typename T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset);
  }

 private:
  void* data_ = MAP_FAILED;
  std::size_t size_ = 0;
};

struct Descriptor {
  int fd = -1;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

unsigned load_acquire(unsigned* value) { return std::atomic_ref(*value).load(std::memory_order_acquire); }
void store_release(unsigned* at, unsigned value) { std::atomic_ref(*at).store(value, std::memory_order_release); }

class IoUringEngine final : public IoEngine {
 public:
  explicit IoUringEngine(unsigned depth) : depth_(std::min(depth, kMaxEntries)) {
    io_uring_params params{};
    params.flags = IORING_SETUP_COOP_TASKRUN;  // completions need no interrupt of the running thread; since Linux 5.19
    ring_.fd = io_uring_setup(depth_, &params);
    if (ring_.fd < 0 && errno == EINVAL) {
      params = io_uring_params{};
      ring_.fd = io_uring_setup(depth_, &params);
    }
    if (ring_.fd < 0) fail("io_uring_setup");

    std::size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    const std::size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    const bool single_mmap = (params.features & IORING_FEAT_SINGLE_MMAP) != 0;
    if (single_mmap) sq_size = std::max(sq_size, cq_size);
    sq_map_ = Mapping(ring_.fd, sq_size, IORING_OFF_SQ_RING);
    if (!single_mmap) cq_map_ = Mapping(ring_.fd, cq_size, IORING_OFF_CQ_RING);
    sqe_map_ = Mapping(ring_.fd, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    const Mapping& cq = single_mmap ? sq_map_ : cq_map_;

    sq_tail_ = sq_map_.at<unsigned>(params.sq_off.tail);
    sq_mask_ = *sq_map_.at<unsigned>(params.sq_off.ring_mask);
    sq_array_ = sq_map_.at<unsigned>(params.sq_off.array);
    sqes_ = sqe_map_.at<io_uring_sqe>(0);
    cq_head_ = cq.at<unsigned>(params.cq_off.head);
    cq_tail_ = cq.at<unsigned>(params.cq_off.tail);
    cq_mask_ = *cq.at<unsigned>(params.cq_off.ring_mask);
    cqes_ = cq.at<io_uring_cqe>(params.cq_off.cqes);
  }

  unsigned submit(std::span<const IoRequest> requests) override {
    // At most depth_ requests are in flight, so neither ring can overflow.
    const auto taken = static_cast<unsigned>(std::min<std::size_t>(requests.size(), depth_ - in_flight_));
    unsigned tail = *sq_tail_;
    for (const IoRequest& request : requests.first(taken)) {
      const unsigned index = tail & sq_mask_;
      io_uring_sqe& sqe = sqes_[index];
      std::memset(&sqe, 0, sizeof sqe);
      sqe.opcode = request.direction == Direction::kRead ? IORING_OP_READ : IORING_OP_WRITE;
      sqe.fd = request.fd;
      sqe.addr = reinterpret_cast<std::uint64_t>(request.data);
      sqe.len = request.length;
      sqe.off = request.offset;
      sqe.user_data = request.tag;
      sq_array_[index] = index;
      ++tail;
    }
    store_release(sq_tail_, tail);
    in_flight_ += taken;
    queued_ += taken;
    enter(0, 0);
    return taken;
  }

  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    unsigned count = take(completions);
    while (count < min) {
      enter(min - count, IORING_ENTER_GETEVENTS);
      count += take(completions.subspan(count));
    }
    return count;
  }

  EngineCapabilities capabilities() const override { return {depth_, true, true}; }

 private:
  // Hands the queued entries to the kernel and waits. What the kernel does not take now (EAGAIN, EBUSY, a signal) stays
  // in the ring and goes with the next call, so nothing is lost and nothing is sent twice.
  void enter(unsigned min_complete, unsigned flags) {
    const int taken = io_uring_enter(ring_.fd, queued_, min_complete, flags);
    if (taken >= 0) {
      queued_ -= static_cast<unsigned>(taken);
    } else if (errno != EINTR && min_complete > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));  // short of memory: completions will free some
    }
  }

  unsigned take(std::span<IoCompletion> completions) {
    unsigned head = *cq_head_;
    const auto count = static_cast<unsigned>(std::min<std::size_t>(load_acquire(cq_tail_) - head, completions.size()));
    for (unsigned i = 0; i < count; ++i, ++head) {
      const io_uring_cqe& cqe = cqes_[head & cq_mask_];
      completions[i] = {cqe.user_data, cqe.res};
    }
    store_release(cq_head_, head);
    in_flight_ -= count;
    return count;
  }

  const unsigned depth_;
  unsigned in_flight_ = 0;  // taken and not yet reaped
  unsigned queued_ = 0;     // in the submission ring, not yet taken by the kernel
  Descriptor ring_;         // closed last: the kernel then waits for what is in flight
  Mapping sq_map_, cq_map_, sqe_map_;
  unsigned* sq_tail_ = nullptr;
  unsigned* sq_array_ = nullptr;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0;
  io_uring_sqe* sqes_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
};

bool available(std::string& why_not) {
  io_uring_params params{};
  const Descriptor ring{io_uring_setup(2, &params)};
  if (ring.fd < 0) {
    why_not = std::string("io_uring_setup: ") + std::strerror(errno);
    return false;
  }
  // IORING_OP_READ and IORING_OP_WRITE are there since Linux 5.6, as is the probe itself.
  std::vector<std::uint64_t> storage((sizeof(io_uring_probe) + 256 * sizeof(io_uring_probe_op)) / 8 + 1);
  auto* probe = reinterpret_cast<io_uring_probe*>(storage.data());
  if (io_uring_register(ring.fd, IORING_REGISTER_PROBE, probe, 256) < 0) {
    why_not = std::string("this kernel's io_uring cannot be probed: ") + std::strerror(errno);
    return false;
  }
  for (const unsigned op : {IORING_OP_READ, IORING_OP_WRITE}) {
    if (op > probe->last_op || (probe->ops[op].flags & IO_URING_OP_SUPPORTED) == 0) {
      why_not = "this kernel's io_uring has no plain read and write";
      return false;
    }
  }
  return true;
}

std::unique_ptr<IoEngine> make(unsigned depth) { return std::make_unique<IoUringEngine>(depth); }

#else

bool available(std::string& why_not) {
  why_not = "built without io_uring (it needs Linux and its headers)";
  return false;
}

std::unique_ptr<IoEngine> make(unsigned) { return nullptr; }

#endif

}  // namespace

const EngineEntry kIoUringEngine = {"io_uring", available, make};

}  // namespace offload_opt
