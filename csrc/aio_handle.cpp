#include "aio_handle.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>

#include "block_pump.h"
#include "locked_memory.h"

namespace offload_opt {
namespace {

constexpr std::uint64_t kMaxBlockSize = 1u << 30;  // one request stays below the kernel's limit of 2 GiB - 4 KiB
constexpr unsigned kMaxDepth = 4096;
constexpr unsigned kMaxThreads = 256;

void check(const HandleConfig& config) {
  const auto within = [](const char* name, std::uint64_t value, std::uint64_t max) {
    if (value >= 1 && value <= max) return;
    throw std::invalid_argument(std::string(name) + " must lie in 1.." + std::to_string(max) + ", not " +
                                std::to_string(value));
  };
  within("block_size", config.block_size, kMaxBlockSize);
  within("queue_depth", config.queue_depth, kMaxDepth);
  within("num_threads", config.num_threads, kMaxThreads);
}

// A read must lie inside the file: what is not there cannot be read.
void check_end(const Operation& operation) {
  const TransferSpec& spec = operation.spec;
  if (spec.direction == Direction::kWrite || spec.length == 0) return;
  const std::uint64_t size = operation.file->size();
  if (spec.offset <= size && spec.length <= size - spec.offset) return;
  throw IoError(ENODATA,
                "reading " + std::to_string(spec.length) + " bytes at offset " + std::to_string(spec.offset) +
                    " passes the end of the file, which has " + std::to_string(size) + " bytes",
                operation.file->path());
}

IoError called_off(const IoError& cause) {
  return IoError(ECANCELED, std::string("not started, because an operation before it failed: ") + cause.what(),
                 cause.path);
}

OperationPtr open_operation(TransferSpec spec, std::uint64_t number, OpenFiles& files, bool registered) {
  constexpr auto kMaxOffset = static_cast<std::uint64_t>(INT64_MAX);
  if (spec.offset > kMaxOffset || spec.length > kMaxOffset - spec.offset) {
    throw std::invalid_argument(std::to_string(spec.length) + " bytes at offset " + std::to_string(spec.offset) +
                                " reach beyond any file's end");
  }
  auto operation = std::make_shared<Operation>(std::move(spec), number);
  const TransferSpec& opened = operation->spec;
  operation->file = files.open(opened.path, opened.fd, opened.direction);
  if (opened.validate) operation->validation_file = files.open(opened.path, opened.fd, Direction::kRead);
  if (registered) operation->region = find_region(opened.data, opened.length);
  return operation;
}

// Reads back what the operation moved, past the page cache where that is possible, and fails it on a difference.
void validate(Operation& operation) try {
  constexpr std::uint64_t kChunk = 1 << 20;
  const std::unique_ptr<char, void (*)(void*)> buffer(static_cast<char*>(std::aligned_alloc(page_size(), kChunk)),
                                                      std::free);
  if (!buffer) throw IoError(ENOMEM, "no memory to validate", operation.file->path());
  IoFile& file = *operation.validation_file;
  const TransferSpec& spec = operation.spec;
  for (std::uint64_t done = 0; done < spec.length;) {
    const std::uint64_t offset = spec.offset + done;
    const std::uint64_t granule = file.granule();
    std::uint64_t length = std::min(kChunk, spec.length - done);
    const bool direct = length >= granule && file.direct_allowed(buffer.get(), offset);
    length = direct ? length / granule * granule : std::min(length, granule - offset % granule);
    const int fd = direct ? file.direct_fd() : file.buffered_fd();
    const ssize_t got = ::pread(fd, buffer.get(), length, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL && direct) {
      file.forbid_direct();
      continue;
    }
    const std::string where = " at offset " + std::to_string(offset);
    if (got < 0) throw IoError(errno, std::string("validation: ") + std::strerror(errno) + where, file.path());
    if (got == 0) throw IoError(ENODATA, "validation: the file ends" + where, file.path());
    const char* const moved = static_cast<const char*>(spec.data) + done;
    if (std::memcmp(buffer.get(), moved, static_cast<std::size_t>(got)) != 0) {
      const auto [first, unused] = std::mismatch(moved, moved + got, buffer.get());
      throw IoError(EIO,
                    "validation: the file and the buffer differ at offset " +
                        std::to_string(offset + static_cast<std::uint64_t>(first - moved)),
                    file.path());
    }
    done += static_cast<std::uint64_t>(got);
  }
} catch (IoError& error) {
  operation.fail(std::move(error));
}

}  // namespace

// A thread with a pump of its own. Others put spans into its inbox.
class Worker {
 public:
  Worker(const HandleConfig& config, std::unique_ptr<IoEngine> engine, BlockPump::SpanEnded span_ended)
      : pump_(std::in_place, config, std::move(engine), std::move(span_ended)), thread_([this] { run(); }) {}

  // Once the span has ended, close() may end the worker: the caller keeps a reference, for there must still be
  // something to be notified.
  void add(Span span) {
    {
      std::lock_guard lock(mutex_);
      inbox_.push_back(std::move(span));
    }
    arrived_.notify_one();  // not under the lock: the thread would run for nothing, and be the later for it
  }

  // Ends the thread once its inbox and pump are empty, and the engine with it, whoever still has a reference.
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    arrived_.notify_one();
    thread_.join();
    pump_.reset();
  }

 private:
  void run() {
    become_io_thread();
    std::deque<Span> taken;
    while (true) {
      {
        std::unique_lock lock(mutex_);
        if (pump_->idle()) arrived_.wait(lock, [this] { return stopping_ || !inbox_.empty(); });
        if (pump_->idle() && inbox_.empty()) return;
        taken.swap(inbox_);
      }
      for (auto& span : taken) pump_->add(std::move(span));
      taken.clear();
      pump_->turn();
    }
  }

  std::mutex mutex_;  // guards inbox_ and stopping_; the pump is the thread's own
  std::condition_variable arrived_;
  std::deque<Span> inbox_;
  bool stopping_ = false;
  std::optional<BlockPump> pump_;
  std::thread thread_;
};

// The workers of one device.
class Queue {
 public:
  // Throws std::system_error where an engine or a thread cannot be made.
  Queue(const HandleConfig& config, const EngineFactory& make_engine, const BlockPump::SpanEnded& span_ended) {
    try {
      for (unsigned i = 0; i < config.num_threads; ++i) {
        workers_.push_back(std::make_shared<Worker>(config, make_engine(config.queue_depth), span_ended));
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  // One span a worker at most, of an operation whose `spans_left` says how many. Any thread.
  void add(std::vector<Span> spans) {
    const unsigned first = spans.size() == 1 ? next_.fetch_add(1) : 0;
    for (unsigned i = 0; i < spans.size(); ++i) {
      const std::shared_ptr<Worker> worker = workers_[(first + i) % workers_.size()];
      worker->add(std::move(spans[i]));
    }
  }

  void stop() {
    for (auto& worker : workers_) worker->stop();
    workers_.clear();
  }

 private:
  std::vector<std::shared_ptr<Worker>> workers_;
  std::atomic<unsigned> next_{0};
};

struct AioHandle::Impl {
  Impl(const HandleConfig& handle_config, EngineFactory factory)
      : config(handle_config), make_engine(std::move(factory)), owner(::getpid()) {
    check(config);
    first_queue = std::make_unique<Queue>(config, make_engine, span_ended());
  }

  BlockPump::SpanEnded span_ended() {
    return [this](const OperationPtr& operation) {
      if (--operation->spans_left == 0) end(operation);
    };
  }

  // The workers exist in the process that made the handle, and only there.
  bool foreign() const { return ::getpid() != owner; }
  void check_usable() const {
    if (foreign()) {
      throw std::runtime_error("this AioHandle was made before fork(), in the parent process; make one in the child");
    }
    if (closed) throw std::invalid_argument("the AioHandle is closed");
  }

  // Queues an operation whose `after` have ended. Ends it instead where it has failed, or has nothing to move.
  void start(const OperationPtr& operation) {
    if (!queue(operation)) end(operation);
  }
  // Completes an operation whose spans have ended, and starts those that waited for it: in a loop, for a chain may be
  // long.
  void end(const OperationPtr& operation);
  bool queue(const OperationPtr& operation);                        // false: there is nothing to wait for
  std::vector<OperationPtr> finish(const OperationPtr& operation);  // returns those that waited for it alone
  Queue& queue_of(dev_t device);

  const HandleConfig config;
  const EngineFactory make_engine;
  const pid_t owner;
  std::atomic<std::uint64_t> submitted{0};  // operations

  std::mutex mutex;  // guards what follows, and the fields of Operation that say so
  std::condition_variable ended_cv;
  std::uint64_t pending = 0;
  std::uint64_t ended_since_wait = 0;
  std::vector<OperationPtr> unreported;  // failed, and nobody was told yet; oldest first
  std::atomic<bool> closed{false};

  std::mutex inline_mutex;  // one run() at a time
  std::unique_ptr<BlockPump> inline_pump;

  OpenFiles files;

  // Last: their threads use everything above. The first device takes the first queue, which is made with the handle so
  // that what is wrong shows there. A queue stays until the handle is closed.
  std::mutex queues_mutex;
  std::unordered_map<dev_t, Queue*> queue_by_device;
  std::unique_ptr<Queue> first_queue;
  std::vector<std::unique_ptr<Queue>> more_queues;
};

Queue& AioHandle::Impl::queue_of(dev_t device) {
  std::lock_guard lock(queues_mutex);
  Queue*& queue = queue_by_device[device];
  if (queue != nullptr) return *queue;
  queue = first_queue.get();
  if (queue_by_device.size() > 1) {
    try {
      more_queues.push_back(std::make_unique<Queue>(config, make_engine, span_ended()));
      queue = more_queues.back().get();
    } catch (const std::system_error&) {
      // No more threads or engines here: sharing a queue is slower, not wrong.
    }
  }
  return *queue;
}

bool AioHandle::Impl::queue(const OperationPtr& operation) {
  Operation& op = *operation;
  op.spec.after.clear();  // a chain of operations must not keep its past alive
  if (!op.failed()) {
    try {
      if (op.deferred) check_end(op);
    } catch (IoError& error) {
      op.fail(std::move(error));
    }
  }
  const std::uint64_t begin = op.spec.offset;
  const std::uint64_t end_offset = begin + op.spec.length;
  if (op.failed() || op.spec.length == 0) return false;
  // Up to one span a worker, cut on block boundaries of the file.
  std::vector<Span> spans;
  const std::uint64_t granule = op.file->granule();
  const std::uint64_t unit = (config.block_size + granule - 1) / granule * granule;
  std::uint64_t next = begin;
  for (unsigned i = 1; i < config.num_threads; ++i) {
    const std::uint64_t cut = (begin + op.spec.length / config.num_threads * i) / unit * unit;
    if (cut > next && cut < end_offset) spans.push_back({operation, std::exchange(next, cut), cut});
  }
  spans.push_back({operation, next, end_offset});
  op.spans_left = static_cast<unsigned>(spans.size());
  queue_of(op.file->device()).add(std::move(spans));
  return true;
}

void AioHandle::Impl::end(const OperationPtr& operation) {
  std::vector<OperationPtr> ended{operation};
  while (!ended.empty()) {
    const OperationPtr next = std::move(ended.back());
    ended.pop_back();
    for (auto& ready : finish(next)) {
      if (!queue(ready)) ended.push_back(std::move(ready));
    }
  }
}

std::vector<OperationPtr> AioHandle::Impl::finish(const OperationPtr& operation) {
  Operation& op = *operation;
  if (op.spec.validate && !op.failed()) validate(op);
  op.file.reset();
  op.validation_file.reset();
  std::vector<OperationPtr> ready;
  {
    std::lock_guard lock(mutex);
    op.ended = true;
    --pending;
    if (op.spec.counted) ++ended_since_wait;
    if (op.failed() && op.spec.counted) unreported.push_back(operation);
    for (auto& dependent : op.dependents) {
      if (op.failed()) {
        dependent->fail(called_off(op.error()));
      }
      if (--dependent->blockers == 0) ready.push_back(std::move(dependent));
    }
    op.dependents.clear();
    ended_cv.notify_all();
  }
  return ready;
}

AioHandle::AioHandle(const HandleConfig& config, EngineFactory make_engine)
    : impl_(std::make_unique<Impl>(config, std::move(make_engine))) {}

AioHandle::~AioHandle() {
  if (impl_->foreign()) {
    (void)impl_.release();  // joining threads that are not here would hang; the memory goes with the process
    return;
  }
  close();
}

OperationPtr AioHandle::submit(TransferSpec spec) {
  impl_->check_usable();
  auto operation = open_operation(std::move(spec), impl_->submitted++, impl_->files, impl_->config.registered);
  // Behind other operations the file's end may still move, so a read's bounds are checked when it starts.
  operation->deferred = !operation->spec.after.empty();
  if (!operation->deferred) check_end(*operation);
  {
    std::lock_guard lock(impl_->mutex);
    impl_->check_usable();
    ++impl_->pending;
    for (const auto& before : operation->spec.after) {
      if (before->ended) {
        if (before->failed()) operation->fail(called_off(before->error()));
        continue;
      }
      before->dependents.push_back(operation);
      ++operation->blockers;
    }
    if (operation->blockers > 0) return operation;
  }
  impl_->start(operation);
  return operation;
}

std::uint64_t AioHandle::run(TransferSpec spec) {
  impl_->check_usable();
  spec.counted = false;
  auto operation = open_operation(std::move(spec), impl_->submitted++, impl_->files, impl_->config.registered);
  check_end(*operation);
  {
    std::lock_guard lock(impl_->mutex);
    impl_->check_usable();
    ++impl_->pending;
  }
  if (operation->spec.length == 0) {
    impl_->end(operation);
    return 0;
  }
  std::lock_guard lock(impl_->inline_mutex);
  if (!impl_->inline_pump) {
    try {
      impl_->inline_pump = std::make_unique<BlockPump>(impl_->config, impl_->make_engine(impl_->config.queue_depth),
                                                       impl_->span_ended());
    } catch (const std::system_error&) {
      // No engine more for the caller's thread: the workers have some.
      impl_->start(operation);
      while (!wait_for(*operation, std::chrono::seconds(1))) {
      }
      return result(*operation);
    }
  }
  operation->spans_left = 1;
  const std::uint64_t offset = operation->spec.offset;
  impl_->inline_pump->add(Span{operation, offset, offset + operation->spec.length});
  while (!impl_->inline_pump->idle()) impl_->inline_pump->turn();
  return result(*operation);
}

bool AioHandle::wait_for(const Operation& operation, std::chrono::milliseconds timeout) {
  if (operation.ended) return true;
  if (impl_->foreign()) impl_->check_usable();
  std::unique_lock lock(impl_->mutex);
  return impl_->ended_cv.wait_for(lock, timeout, [&] { return operation.ended.load(); });
}

std::uint64_t AioHandle::result(Operation& operation) {
  if (!operation.failed()) return operation.bytes_moved;
  {
    std::lock_guard lock(impl_->mutex);
    std::erase_if(impl_->unreported, [&](const OperationPtr& failed) { return failed.get() == &operation; });
  }
  throw operation.error();
}

bool AioHandle::wait_for_all(std::chrono::milliseconds timeout) {
  if (impl_->foreign()) impl_->check_usable();
  std::unique_lock lock(impl_->mutex);
  return impl_->ended_cv.wait_for(lock, timeout, [&] { return impl_->pending == 0; });
}

std::uint64_t AioHandle::finish_all() {
  std::lock_guard lock(impl_->mutex);
  const std::uint64_t count = std::exchange(impl_->ended_since_wait, 0);
  const std::vector<OperationPtr> failed = std::exchange(impl_->unreported, {});
  if (!failed.empty()) throw failed.front()->error();
  return count;
}

void AioHandle::close() {
  if (impl_->foreign()) return;
  {
    std::unique_lock lock(impl_->mutex);
    impl_->closed = true;
    impl_->ended_cv.wait(lock, [&] { return impl_->pending == 0; });
  }
  {
    std::lock_guard lock(impl_->queues_mutex);
    if (impl_->first_queue) impl_->first_queue->stop();
    for (auto& queue : impl_->more_queues) queue->stop();
  }
  std::lock_guard lock(impl_->inline_mutex);
  impl_->inline_pump.reset();
}

const HandleConfig& AioHandle::config() const { return impl_->config; }

bool ended(const Operation& operation) { return operation.ended; }

const std::vector<const EngineEntry*>& engine_table() {
  static const std::vector<const EngineEntry*> table = {&kIoUringEngine, &kLibaioEngine, &kThreadsEngine};
  return table;
}

}  // namespace offload_opt
