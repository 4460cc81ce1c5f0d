// io_uring through its raw system calls: no liburing at build or run time.
//
// The rings are shared with the kernel. Of the submission ring we own the tail and the kernel the head; of the
// completion ring the kernel owns the tail and we the head. Each side publishes its index with a release store.
//
// Memory regions and files that are used much are registered with the ring, so that the kernel need not look up and pin
// pages, nor take and drop a reference to the file, for each request.
#include "io_engine.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/version.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 6, 0)
#define OFFLOAD_OPT_HAVE_IO_URING 1
#endif
#endif
#ifdef OFFLOAD_OPT_HAVE_IO_URING
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>
#endif

namespace offload_opt {
namespace {

#ifdef OFFLOAD_OPT_HAVE_IO_URING

// The kernel's limit of IORING_MAX_ENTRIES.
constexpr unsigned kMaxEntries = 32768;

// From here to kUpdateBuffers: the kernel's interface as of Linux 5.19, for headers that are older than the kernel that
// runs. Kernels that lack it refuse it, which is seen at run time.
constexpr unsigned kCoopTaskrun = 1u << 8;  // IORING_SETUP_COOP_TASKRUN

struct TableRegistration {  // io_uring_rsrc_register
  std::uint32_t slots;
  std::uint32_t flags;
  std::uint64_t reserved;
  std::uint64_t data;
  std::uint64_t tags;
};
constexpr std::uint32_t kSparse = 1;       // IORING_RSRC_REGISTER_SPARSE
constexpr unsigned kRegisterFiles = 13;    // IORING_REGISTER_FILES2
constexpr unsigned kRegisterBuffers = 15;  // IORING_REGISTER_BUFFERS2

struct TableUpdate {  // io_uring_rsrc_update2
  std::uint32_t first_slot;
  std::uint32_t reserved;
  std::uint64_t data;
  std::uint64_t tags;
  std::uint32_t count;
  std::uint32_t reserved2;
};
constexpr unsigned kUpdateBuffers = 16;  // IORING_REGISTER_BUFFERS_UPDATE

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

// An empty table of `count` slots for buffers or files. False where the kernel (before Linux 5.19) has none.
bool register_table(int ring, unsigned opcode, unsigned count) {
  TableRegistration table{};
  table.slots = count;
  table.flags = kSparse;
  return io_uring_register(ring, opcode, &table, sizeof table) >= 0;
}

// The memory regions that one ring knows. A region is registered when as many bytes as it has were moved: registering
// costs about what that saves. The ring's thread asks for slots; any thread may end a region.
class RegisteredBuffers final : public MemoryRegion::Registrar, public std::enable_shared_from_this<RegisteredBuffers> {
 public:
  explicit RegisteredBuffers(int ring) : ring_(ring) {
    if (!register_table(ring, kRegisterBuffers, kSlots)) return;
    for (unsigned slot = kSlots; slot > 0; --slot) free_.push_back(slot - 1);
    works_ = true;
  }

  // The slot that holds the request's memory, or -1.
  int slot_of(const IoRequest& request) {
    if (!works_ || request.region == nullptr) return -1;
    const MemoryRegion& region = *request.region;
    std::lock_guard lock(mutex_);
    auto [found, is_new] = regions_.try_emplace(&region);
    Known& known = found->second;
    if (is_new) {
      known.slots.assign((region.size + kMaxSlotBytes - 1) / kMaxSlotBytes, kUnregistered);
      region.tell_at_end(weak_from_this());
    }
    const auto begin = static_cast<std::size_t>(static_cast<char*>(request.data) - static_cast<char*>(region.data));
    const std::size_t part = begin / kMaxSlotBytes;
    if ((begin + request.length - 1) / kMaxSlotBytes != part) return -1;
    int& slot = known.slots[part];
    if (slot == kUnregistered && known.bytes_moved >= region.size) slot = enter(region, part);
    known.bytes_moved += request.length;
    return std::max(slot, -1);
  }

  void forget(const MemoryRegion& region) override {
    std::lock_guard lock(mutex_);
    const auto found = regions_.find(&region);
    if (found == regions_.end()) return;
    for (const int slot : found->second.slots) {
      if (slot < 0) continue;
      if (ring_ >= 0) update(static_cast<unsigned>(slot), {});
      free_.push_back(static_cast<unsigned>(slot));
    }
    regions_.erase(found);
  }

  // The ring is about to be closed. Not only by that: a forked child has it open, too, and would keep the memory.
  void stop() {
    std::lock_guard lock(mutex_);
    if (works_) io_uring_register(ring_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    ring_ = -1;
  }

 private:
  static constexpr unsigned kSlots = 1024;
  static constexpr std::size_t kMaxSlotBytes = 1u << 30;  // the kernel's limit
  static constexpr int kUnregistered = -1;
  static constexpr int kRefused = -2;  // by the kernel, over RLIMIT_MEMLOCK for example: not asked again

  struct Known {
    std::uint64_t bytes_moved = 0;
    std::vector<int> slots;  // one for each kMaxSlotBytes of the region
  };

  int enter(const MemoryRegion& region, std::size_t part) {
    if (free_.empty()) return kRefused;
    const std::size_t begin = part * kMaxSlotBytes;
    const iovec memory{static_cast<char*>(region.data) + begin, std::min(region.size - begin, kMaxSlotBytes)};
    if (!update(free_.back(), memory)) return kRefused;
    const unsigned slot = free_.back();
    free_.pop_back();
    return static_cast<int>(slot);
  }

  bool update(unsigned slot, const iovec& memory) {
    TableUpdate change{};
    change.first_slot = slot;
    change.data = reinterpret_cast<std::uint64_t>(&memory);
    change.count = 1;
    return io_uring_register(ring_, kUpdateBuffers, &change, sizeof change) == 1;
  }

  bool works_ = false;
  std::mutex mutex_;  // guards what follows
  int ring_;
  std::unordered_map<const MemoryRegion*, Known> regions_;
  std::vector<unsigned> free_;
};

// The files that one ring knows. A file is registered with its 64th request, and only until the ring has nothing in
// flight: a registered file stays open for the kernel, so its space is not freed when it is deleted.
class RegisteredFiles {
 public:
  explicit RegisteredFiles(int ring) : ring_(ring), works_(register_table(ring, kRegisterFiles, kSlots)) {}

  // The slot that holds the request's file, or -1.
  int slot_of(const IoRequest& request) {
    if (!works_ || request.file_id == 0) return -1;
    Known& known = known_[find(request.file_id)];
    if (known.file_id != request.file_id) {  // the one used least recently makes room
      // Requests in the ring that the kernel has not taken yet name a registered file by its slot: it stays theirs.
      if (known.registered) return -1;
      known = {request.file_id, 0, 0, false};
    }
    known.last_use = ++uses_;
    ++known.requests;
    if (!known.registered && known.requests >= kRequestsToRegister) known.registered = update(known, request.fd);
    return known.registered ? static_cast<int>(&known - known_.data()) : -1;
  }

  void clear() {
    if (uses_ == 0) return;
    for (Known& known : known_) drop(known);
    uses_ = 0;
  }

 private:
  static constexpr unsigned kSlots = 16;
  static constexpr std::uint64_t kRequestsToRegister = 64;

  struct Known {
    std::uint64_t file_id = 0;
    std::uint64_t requests = 0;
    std::uint64_t last_use = 0;
    bool registered = false;
  };

  // The place of the file, or of the one to be replaced by it: a registered one only where all are.
  std::size_t find(std::uint64_t file_id) const {
    const auto age = [](const Known& known) { return std::pair(known.registered, known.last_use); };
    std::size_t oldest = 0;
    for (std::size_t i = 0; i < known_.size(); ++i) {
      if (known_[i].file_id == file_id) return i;
      if (age(known_[i]) < age(known_[oldest])) oldest = i;
    }
    return oldest;
  }

  void drop(Known& known) {
    if (known.registered) update(known, -1);
    known = {};
  }

  bool update(const Known& known, int fd) {
    io_uring_files_update change{};
    change.offset = static_cast<unsigned>(&known - known_.data());
    change.fds = reinterpret_cast<std::uint64_t>(&fd);
    return io_uring_register(ring_, IORING_REGISTER_FILES_UPDATE, &change, 1) == 1;
  }

  const int ring_;
  const bool works_;
  std::uint64_t uses_ = 0;
  std::array<Known, kSlots> known_;
};

class IoUringEngine final : public IoEngine {
 public:
  explicit IoUringEngine(unsigned depth) : depth_(std::min(depth, kMaxEntries)) {
    io_uring_params params{};
    params.flags = kCoopTaskrun;  // completions need no interrupt of the running thread; since Linux 5.19
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
    buffers_ = std::make_shared<RegisteredBuffers>(ring_.fd);
    files_ = std::make_unique<RegisteredFiles>(ring_.fd);
  }

  ~IoUringEngine() override { buffers_->stop(); }

  // Only fills the submission ring: reap() hands it to the kernel in the system call that waits.
  unsigned submit(std::span<const IoRequest> requests) override {
    // At most depth_ requests are in flight, so neither ring can overflow.
    const auto taken = static_cast<unsigned>(std::min<std::size_t>(requests.size(), depth_ - in_flight_));
    unsigned tail = *sq_tail_;
    for (const IoRequest& request : requests.first(taken)) {
      const unsigned index = tail & sq_mask_;
      fill(sqes_[index], request);
      sq_array_[index] = index;
      ++tail;
    }
    store_release(sq_tail_, tail);
    in_flight_ += taken;
    queued_ += taken;
    return taken;
  }

  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    unsigned count = take(completions);  // no system call for what is there already
    if (count >= min && queued_ > 0) enter(0, 0);
    while (count < min) {
      enter(min - count, IORING_ENTER_GETEVENTS);
      count += take(completions.subspan(count));
    }
    if (in_flight_ == 0) files_->clear();
    return count;
  }

  EngineCapabilities capabilities() const override { return {depth_}; }

 private:
  void fill(io_uring_sqe& sqe, const IoRequest& request) {
    const bool reading = request.direction == Direction::kRead;
    std::memset(&sqe, 0, sizeof sqe);
    if (const int slot = buffers_->slot_of(request); slot >= 0) {
      sqe.opcode = reading ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
      sqe.buf_index = static_cast<std::uint16_t>(slot);
    } else {
      sqe.opcode = reading ? IORING_OP_READ : IORING_OP_WRITE;
    }
    if (const int slot = files_->slot_of(request); slot >= 0) {
      sqe.flags = IOSQE_FIXED_FILE;
      sqe.fd = slot;
    } else {
      sqe.fd = request.fd;
    }
    sqe.addr = reinterpret_cast<std::uint64_t>(request.data);
    sqe.len = request.length;
    sqe.off = request.offset;
    sqe.user_data = request.tag;
  }

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
  Descriptor ring_;
  std::shared_ptr<RegisteredBuffers> buffers_;
  std::unique_ptr<RegisteredFiles> files_;
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
  why_not = "built without io_uring (it needs the headers of Linux 5.6 or later)";
  return false;
}

std::unique_ptr<IoEngine> make(unsigned) { return nullptr; }

#endif

}  // namespace

const EngineEntry kIoUringEngine = {"io_uring", available, make};

}  // namespace offload_opt
