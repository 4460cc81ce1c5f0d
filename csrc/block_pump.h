// The inner loop of the handle: keeps an engine's queue full with the blocks of the operations that it is given, and
// turns completions into progress. One thread at a time uses a pump.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "aio_handle.h"

namespace offload_opt {

// One read or write, from its submission to its end. It is cut into spans, one a worker at most; the worker that ends
// the last span ends the operation.
class Operation {
 public:
  Operation(TransferSpec transfer, std::uint64_t place) : spec(std::move(transfer)), number(place) {}

  // The first failure wins; later blocks of a failed operation are not started. Any thread.
  void fail(IoError error);
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  // Only after the operation has ended.
  const IoError& error() const { return *error_; }

  TransferSpec spec;
  const std::uint64_t number;                  // of its handle's operations, in the order of their submission
  std::shared_ptr<const MemoryRegion> region;  // that the memory lies in, or null
  std::shared_ptr<IoFile> file;                // let go of when the operation ends
  std::shared_ptr<IoFile> validation_file;     // to read back from; null without spec.validate
  bool deferred = false;                       // waits for others; set once, before it is shared
  std::atomic<unsigned> spans_left{0};         // spans that have not ended
  std::atomic<std::uint64_t> bytes_moved{0};
  std::atomic<bool> ended{false};

  // Guarded by the handle's mutex.
  unsigned blockers = 0;                 // operations of spec.after that have not ended
  std::vector<OperationPtr> dependents;  // operations that name this one in their spec.after

 private:
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::optional<IoError> error_;
};

// A run of bytes of one operation, worked on by one pump.
struct Span {
  OperationPtr operation;
  std::uint64_t next;        // file offset of the first byte not yet requested
  std::uint64_t end;         // file offset behind the last byte
  unsigned blocks_open = 0;  // requested and not yet ended
};

class BlockPump {
 public:
  using SpanEnded = std::function<void(const OperationPtr&)>;

  // `span_ended` is called on the pump's thread when the last block of a span has ended, well or not.
  BlockPump(const HandleConfig& config, std::unique_ptr<IoEngine> engine, SpanEnded span_ended);

  // The span takes its operation's place in the order of submission. So one that had to wait for others goes before
  // what was submitted after it: its caller wants it first.
  void add(Span span);
  bool idle() const { return spans_.empty(); }
  // Fills the queue, then waits for completions and handles them. Does nothing when idle.
  void turn();

 private:
  // A request in flight or to be sent again. What has been moved of it is behind `request.data` and `request.offset`.
  struct Block {
    std::list<Span>::iterator span;
    IoRequest request;
    bool direct = false;
    unsigned attempts = 0;  // in a row that moved nothing
  };

  void fill();
  bool prepare_next(Block& block);
  void send(std::vector<unsigned>& slots);
  void complete(unsigned slot, std::int64_t res);
  void advance(unsigned slot, std::uint64_t moved);
  void retry(unsigned slot);
  void give_up(unsigned slot, int error, const std::string& what);
  void finish_block(unsigned slot);
  void drop_finished(std::list<Span>::iterator span);
  void choose_descriptor(Block& block) const;

  const HandleConfig config_;
  std::unique_ptr<IoEngine> engine_;
  SpanEnded span_ended_;
  std::list<Span> spans_;         // by the numbers of their operations; a span leaves when its last block has ended
  std::vector<Block> blocks_;     // one a slot of the queue; a request's tag is its slot
  std::vector<unsigned> free_;    // slots without a block
  std::vector<unsigned> resend_;  // slots whose block is to be sent again
  std::vector<IoRequest> batch_;
  std::vector<IoCompletion> completions_;
  unsigned in_flight_ = 0;
  unsigned most_attempts_ = 0;  // of the blocks that moved nothing in this turn
};

}  // namespace offload_opt
