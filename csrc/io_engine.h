// The contract of an I/O engine: the one header that engines include.
//
// An engine moves bytes between memory and open files and reports what happened. It never retries, never splits and
// never looks at file names: that is the handle's work (aio_handle.h). One thread at a time uses an engine.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

namespace offload_opt {

enum class Direction : std::uint8_t { kRead, kWrite };

// Memory that stays where it is for long, so that an engine may register it with the kernel once instead of having its
// pages looked up and pinned for each request.
class MemoryRegion {
 public:
  // Keeps registrations of regions. One that outlives its registrar has nothing to forget.
  class Registrar {
   public:
    virtual ~Registrar() = default;
    // Drops what was registered of the region. No request uses it any more. Called on any thread.
    virtual void forget(const MemoryRegion& region) = 0;
  };

  MemoryRegion(void* data, std::size_t size);
  // Must be called before the memory is unmapped: every registrar forgets the region. Does nothing in a child of
  // fork(), where the registrations are the parent's.
  void end();
  // Whether this process is a child of the one that made the region.
  bool foreign() const;

  // Engines: `registrar` is told when the region ends.
  void tell_at_end(std::weak_ptr<Registrar> registrar) const;

  void* const data;
  const std::size_t size;  // bytes

 private:
  const pid_t owner_;
  mutable std::mutex mutex_;
  mutable std::vector<std::weak_ptr<Registrar>> registrars_;
};

// One transfer. `data` must stay valid, and `fd` open, until its completion has been reaped.
struct IoRequest {
  Direction direction = Direction::kRead;
  int fd = -1;
  void* data = nullptr;
  std::uint32_t length = 0;  // bytes
  std::uint64_t offset = 0;  // bytes from the start of the file
  std::uint64_t tag = 0;     // handed back unchanged in the completion
  // Hints for engines that register: the region that `data` lies in, or null; and a number that means what is open as
  // `fd` and will never mean anything else, or 0.
  const MemoryRegion* region = nullptr;
  std::uint64_t file_id = 0;
};

struct IoCompletion {
  std::uint64_t tag = 0;
  std::int64_t res = 0;  // bytes moved, which may be fewer than asked for, or -errno
};

struct EngineCapabilities {
  unsigned depth;  // requests that it takes before one has to be reaped
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;

  // Takes requests in order and returns how many it took: fewer than given when the queue is full. May hold them back
  // until the next reap(), which can then start and await them in one system call.
  virtual unsigned submit(std::span<const IoRequest> requests) = 0;

  // Starts what was held back, blocks until at least `min` completions are there, and stores up to `completions.size()`
  // of them. Returns how many. The caller must have at least `min` requests in flight. May return fewer than `min` when
  // interrupted.
  virtual unsigned reap(unsigned min, std::span<IoCompletion> completions) = 0;

  virtual EngineCapabilities capabilities() const = 0;
};

// Called first by each thread of ours, an engine's too. Blocks signals, which belong to the program's own threads, and
// asks the scheduler to run the thread as soon as it is woken.
void become_io_thread();

// A row of the engine table. `available` is a real probe: it tries the engine's system calls once and, where they do
// not work, says why. `make` throws std::system_error where resources are short.
struct EngineEntry {
  const char* name;
  bool (*available)(std::string& why_not);
  // `depth`: requests that may be at the device at once.
  std::unique_ptr<IoEngine> (*make)(unsigned depth);
};

extern const EngineEntry kIoUringEngine;
extern const EngineEntry kLibaioEngine;
extern const EngineEntry kThreadsEngine;

}  // namespace offload_opt
