// The asynchronous I/O handle: splits operations into blocks, queues them on worker threads, reads every result,
// resubmits what came short, and completes each operation exactly once.
//
// Each device has workers of its own, so that a slow one does not hold up the rest.
//
// Ownership: the handle owns its worker threads and their engines. An operation is shared by the handle, while it is
// pending, and by whoever holds its pointer; it owns its open file until it ends, and never owns its memory: the caller
// keeps the memory alive until the operation has ended. All public members may be called from any thread.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "io_engine.h"
#include "io_file.h"

namespace offload_opt {

struct HandleConfig {
  std::uint64_t block_size = 1 << 20;  // bytes of one request to the engine
  unsigned queue_depth = 32;           // requests in flight on one worker
  bool single_submit = false;          // one request a system call
  bool overlap_events = true;          // refill the queue while completions arrive, instead of draining it first
  unsigned num_threads = 1;            // workers for each device, each with an engine of its own
  bool registered = true;              // let engines register memory and files with the kernel
};

// Makes the engine of one worker. The handle is given a function so that tests can put a fault engine in between.
using EngineFactory = std::function<std::unique_ptr<IoEngine>(unsigned depth)>;

class Operation;
using OperationPtr = std::shared_ptr<Operation>;

struct TransferSpec {
  Direction direction;
  void* data;
  std::uint64_t length;  // bytes
  std::uint64_t offset;  // bytes from the start of the file
  std::string path;      // empty: use `fd`
  int fd = -1;
  bool validate = false;              // read back and compare what was moved
  bool counted = true;                // finish_all() counts it and reports its error: not so for a blocking call's own
  std::vector<OperationPtr> after{};  // start only when these have ended; fail with ECANCELED if one of them failed
};

class AioHandle {
 public:
  // Throws std::invalid_argument for a setting out of range, std::system_error where an engine cannot be made.
  AioHandle(const HandleConfig& config, EngineFactory make_engine);
  // Closes. In a child of fork(), where the workers do not exist, leaves everything alone.
  ~AioHandle();
  AioHandle(const AioHandle&) = delete;
  AioHandle& operator=(const AioHandle&) = delete;

  // Opens the file, checks that a read lies inside it, and queues the transfer. Throws IoError before anything is
  // touched.
  OperationPtr submit(TransferSpec spec);

  // Does the transfer on the caller's thread. Returns bytes moved. Throws IoError.
  std::uint64_t run(TransferSpec spec);

  // Waits until `operation` has ended or `timeout` has passed; returns whether it has ended.
  bool wait_for(const Operation& operation, std::chrono::milliseconds timeout);
  // The result of an operation that has ended: bytes moved. Throws its IoError, which finish_all() then does not
  // repeat.
  std::uint64_t result(Operation& operation);

  // Waits until nothing is pending or `timeout` has passed; returns whether nothing is.
  bool wait_for_all(std::chrono::milliseconds timeout);
  // The number of operations that ended since the last call. Throws the first IoError that nobody was told of; the rest
  // are dropped with it. Call it after wait_for_all().
  std::uint64_t finish_all();

  // Waits for everything pending, then stops the workers. Idempotent.
  void close();

  const HandleConfig& config() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Whether `operation` has ended, without waiting.
bool ended(const Operation& operation);

// The engines in the order in which "auto" tries them.
const std::vector<const EngineEntry*>& engine_table();

}  // namespace offload_opt
