// The contract of an I/O engine: the one header that engines include.
//
// An engine moves bytes between memory and open files and reports what happened. It never retries, never splits and
// never looks at file names: that is the handle's work (aio_handle.h). One thread at a time uses an engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace offload_opt {

enum class Direction : std::uint8_t { kRead, kWrite };

// One transfer. `data` must stay valid, and `fd` open, until its completion has been reaped.
struct IoRequest {
  Direction direction = Direction::kRead;
  int fd = -1;
  void* data = nullptr;
  std::uint32_t length = 0;  // bytes
  std::uint64_t offset = 0;  // bytes from the start of the file
  std::uint64_t tag = 0;     // handed back unchanged in the completion
};

struct IoCompletion {
  std::uint64_t tag = 0;
  std::int64_t res = 0;  // bytes moved, which may be fewer than asked for, or -errno
};

struct EngineCapabilities {
  unsigned depth;      // requests that may be in flight at once
  bool batches;        // submit() hands several requests to the kernel in one system call
  bool kernel_queued;  // requests wait in the kernel, not in threads of ours
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;

  // Takes requests in order and returns how many it took: fewer than given when the queue is full. Never blocks on I/O.
  virtual unsigned submit(std::span<const IoRequest> requests) = 0;

  // Blocks until at least `min` completions are there, and stores up to `completions.size()` of them. Returns how many.
  // The caller must have at least `min` requests in flight. May return fewer than `min` when interrupted.
  virtual unsigned reap(unsigned min, std::span<IoCompletion> completions) = 0;

  virtual EngineCapabilities capabilities() const = 0;
};

// A row of the engine table. `available` is a real probe: it tries the engine's system calls once and, where they do
// not work, says why. `make` throws std::system_error where resources are short.
struct EngineEntry {
  const char* name;
  bool (*available)(std::string& why_not);
  std::unique_ptr<IoEngine> (*make)(unsigned depth);
};

extern const EngineEntry kIoUringEngine;
extern const EngineEntry kThreadsEngine;

}  // namespace offload_opt
