// The only file that knows Python: converts, releases the GIL, calls, converts back.
//
// An operation's memory belongs to a Python object, which must live until the operation has ended and must be let go of
// with the GIL held and no native lock taken. So each Handle keeps those objects in a list that only Python-side calls
// touch; worker threads never see Python.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <span>
#include <system_error>
#include <thread>

#include "adam.h"
#include "aio_handle.h"
#include "coding.h"
#include "leaf_hashes.h"
#include "locked_memory.h"
#include "parallel.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace py = pybind11;
using namespace offload_opt;

namespace {

// How long a wait keeps Ctrl-C waiting.
constexpr std::chrono::milliseconds kSignalInterval{100};

// Lets go of the GIL as long as it lives. When the interpreter ends, a daemon thread that takes the GIL back is ended
// on the spot, and if that is inside frames of ours, C++ answers with an abort. So before the end, prepare_to_exit()
// waits until all threads have come out, and from then on lets only its own caller in.
class WithoutGil {
 public:
  WithoutGil() {
    if (exiting && std::this_thread::get_id() != exiting_thread) {
      throw std::runtime_error("the interpreter is about to end: no more I/O on this thread");
    }
    ++outside;  // before others may run
    state_ = PyEval_SaveThread();
  }
  ~WithoutGil() {
    PyEval_RestoreThread(state_);
    --outside;
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // All handles must be closed by now, so that nothing that a thread waits for is still to come.
  static void prepare_to_exit() {
    exiting_thread = std::this_thread::get_id();
    exiting = true;
    PyThreadState* const state = PyEval_SaveThread();
    while (outside > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    PyEval_RestoreThread(state);
  }

  // In a child of fork() there are no other threads.
  static void forget_threads() { outside = 0; }

 private:
  inline static std::atomic<unsigned> outside{0};
  // Both only with the GIL held.
  inline static bool exiting = false;
  inline static std::thread::id exiting_thread;
  PyThreadState* state_;
};

// Python objects that pending operations' memory belongs to. With the GIL held.
class Buffers {
 public:
  void keep(OperationPtr operation, py::object buffer) { kept_.emplace_back(std::move(operation), std::move(buffer)); }

  // Operations end nearly in the order of their submission, so looking at the front is enough.
  void let_go_of_ended() {
    while (!kept_.empty() && ended(*kept_.front().first)) {
      const auto last = std::move(kept_.front());  // its object may run Python code: out of the list first
      kept_.pop_front();
    }
  }

  void let_go_of(const OperationPtr& operation) {
    const auto found =
        std::find_if(kept_.begin(), kept_.end(), [&](const auto& kept) { return kept.first == operation; });
    if (found == kept_.end()) return;
    const auto last = std::move(*found);
    kept_.erase(found);
  }

 private:
  std::deque<std::pair<OperationPtr, py::object>> kept_;
};

template <typename Call>
auto without_gil(Call call) {
  const WithoutGil release;
  return call();
}

// Calls `poll` with a time to wait for until it returns true: first for no time, for what has ended already, and then
// without the GIL. Lets Python's signal handlers run in between.
template <typename Poll>
void wait_interruptibly(Poll poll) {
  if (poll(std::chrono::milliseconds(0))) return;
  while (true) {
    {
      WithoutGil release;
      if (poll(kSignalInterval)) return;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

struct PyOperation {
  std::shared_ptr<AioHandle> handle;
  std::shared_ptr<Buffers> buffers;
  OperationPtr operation;
  py::object buffer;  // keeps the memory alive as long as the future

  bool done() const { return ended(*operation); }
  std::uint64_t wait() {
    wait_interruptibly([&](auto time) { return handle->wait_for(*operation, time); });
    buffers->let_go_of(operation);
    return handle->result(*operation);
  }
};

class PyHandle {
 public:
  PyHandle(const HandleConfig& config, const std::string& engine) {
    for (const EngineEntry* entry : engine_table()) {
      if (engine == entry->name) handle_ = std::make_shared<AioHandle>(config, entry->make);
    }
    if (!handle_) throw std::invalid_argument("no engine is called '" + engine + "'");
  }

  ~PyHandle() {
    try {
      close();
    } catch (const std::runtime_error&) {
      // The interpreter is about to end. The handle then closes with the GIL held.
    }
  }

  PyOperation submit(bool write, std::uintptr_t data, std::uint64_t length, const std::string& path, int fd,
                     std::uint64_t offset, bool validate, py::object buffer, const std::vector<PyOperation*>& after) {
    TransferSpec spec = make_spec(write, data, length, path, fd, offset, validate);
    for (const PyOperation* before : after) {
      if (before->handle != handle_) throw std::invalid_argument("after: an operation of another handle");
      spec.after.push_back(before->operation);
    }
    buffers_->let_go_of_ended();
    OperationPtr operation;
    {
      WithoutGil release;
      operation = handle_->submit(std::move(spec));
    }
    buffers_->keep(operation, buffer);
    return {handle_, buffers_, std::move(operation), std::move(buffer)};
  }

  std::uint64_t run_on_workers(bool write, std::uintptr_t data, std::uint64_t length, const std::string& path, int fd,
                               std::uint64_t offset, bool validate, py::object buffer) {
    TransferSpec spec = make_spec(write, data, length, path, fd, offset, validate);
    spec.counted = false;
    buffers_->let_go_of_ended();
    OperationPtr operation;
    {
      WithoutGil release;
      operation = handle_->submit(std::move(spec));
    }
    // Ctrl-C may leave the wait below while the operation goes on.
    buffers_->keep(operation, std::move(buffer));
    wait_interruptibly([&](auto time) { return handle_->wait_for(*operation, time); });
    buffers_->let_go_of(operation);
    return handle_->result(*operation);
  }

  std::uint64_t run_here(bool write, std::uintptr_t data, std::uint64_t length, const std::string& path, int fd,
                         std::uint64_t offset, bool validate) {
    TransferSpec spec = make_spec(write, data, length, path, fd, offset, validate);
    WithoutGil release;
    return handle_->run(std::move(spec));
  }

  std::uint64_t wait() {
    wait_interruptibly([&](auto time) { return handle_->wait_for_all(time); });
    buffers_->let_go_of_ended();
    return handle_->finish_all();
  }

  void close() {
    {
      WithoutGil release;
      handle_->close();
    }
    buffers_->let_go_of_ended();
  }

 private:
  static TransferSpec make_spec(bool write, std::uintptr_t data, std::uint64_t length, const std::string& path, int fd,
                                std::uint64_t offset, bool validate) {
    TransferSpec spec{};
    spec.direction = write ? Direction::kWrite : Direction::kRead;
    spec.data = reinterpret_cast<void*>(data);
    spec.length = length;
    spec.offset = offset;
    spec.path = path;
    spec.fd = fd;
    spec.validate = validate;
    return spec;
  }

  std::shared_ptr<AioHandle> handle_;
  const std::shared_ptr<Buffers> buffers_ = std::make_shared<Buffers>();
};

// Memory that Python sees through the buffer protocol. `on_free(address)` is called just before it is unmapped: a
// driver that has registered the memory must forget it first.
struct PyLockedMemory {
  PyLockedMemory(std::size_t size, py::object on_free_call)
      : memory(without_gil([&] { return std::make_unique<LockedMemory>(size); })), on_free(std::move(on_free_call)) {}
  ~PyLockedMemory() {
    if (on_free.is_none() || Py_IsInitialized() == 0) return;
    try {
      on_free(reinterpret_cast<std::uintptr_t>(memory->data()));
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("LockedMemory");
    }
  }
  const std::unique_ptr<LockedMemory> memory;
  py::object on_free;
};

std::pair<std::uintptr_t, std::uint64_t> buffer_address(const py::buffer& buffer, bool writable) {
  Py_buffer view;
  const int flags = PyBUF_ANY_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(buffer.ptr(), &view, flags) != 0) throw py::error_already_set();
  const std::pair<std::uintptr_t, std::uint64_t> result{reinterpret_cast<std::uintptr_t>(view.buf),
                                                        static_cast<std::uint64_t>(view.len)};
  PyBuffer_Release(&view);
  return result;
}

py::list engines() {
  py::list rows;
  for (const EngineEntry* entry : engine_table()) {
    std::string why_not;
    const bool works = without_gil([&] { return entry->available(why_not); });
    rows.append(py::make_tuple(entry->name, works, why_not));
  }
  return rows;
}

// Of a tuple (format, count, address of values, of stored, of beside, of ties, their number, position), see coding.h.
// Field by field: as a std::tuple it would take as long as a thousand elements.
Coding coding_of(const py::tuple& fields) {
  const auto number = [&](std::size_t i) { return fields[i].cast<std::size_t>(); };
  const auto memory = [&](std::size_t i) { return reinterpret_cast<void*>(number(i)); };
  return {.format = static_cast<Format>(number(0)),
          .count = number(1),
          .values = static_cast<float*>(memory(2)),
          .stored = memory(3),
          .beside = memory(4),
          .ties = static_cast<const std::int32_t*>(memory(5)),
          .tie_count = number(6),
          .position = number(7)};
}

std::vector<Coding> codings_of(const py::sequence& tuples) {
  std::vector<Coding> codings;
  codings.reserve(tuples.size());
  for (const py::handle fields : tuples) codings.push_back(coding_of(fields.cast<py::tuple>()));
  return codings;
}

py::bytes bytes_of(const std::vector<std::int32_t>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(std::int32_t)};
}

// An update that is ready but for where its unit's bytes lie. What it takes to make one, in Python and here, is done
// before: after another unit's update nothing of it is in a cache.
class AdamUpdate {
 public:
  using Options = std::tuple<double, double, double, double, double, bool, bool>;  // AdamStep's

  // In `tuples`, as coding_of() takes them, state is as AdamRun::in_unit() has it. `steps_taken` is counted up.
  AdamUpdate(const py::sequence& tuples, const std::vector<std::uint64_t>& keys, std::uint64_t first,
             const Options& options, float* steps_taken)
      : step_(std::apply([](auto... values) { return AdamStep{values...}; }, options)),
        first_(first),
        steps_taken_(steps_taken) {
    std::vector<Coding> codings = codings_of(tuples);
    for (std::size_t i = 0; i < codings.size(); ++i) codings[i].key = keys.at(i);
    run_ = {codings.at(0), codings.at(1), codings.at(2), codings.at(3)};
  }

  // Once.
  py::bytes run(std::uintptr_t data, unsigned threads, LeafHashes* hashes) {
    const float step = *steps_taken_ + 1;
    step_.step = step;
    const auto ties = without_gil([&] { return adam(run_.in_unit(data), step_, first_, threads, hashes); });
    *steps_taken_ = step;
    return bytes_of(ties);
  }

 private:
  AdamRun run_;
  AdamStep step_;
  const std::uint64_t first_;
  float* const steps_taken_;
};

// Whoever calls vouches for addresses and lengths.
void bind_codings(py::module_& module) {
  module.def(
      "decode",
      [](const py::sequence& tuples, unsigned threads) {
        const std::vector<Coding> codings = codings_of(tuples);
        without_gil([&] { decode(codings, threads); });
      },
      py::arg("codings"), py::arg("threads"));
  module.def(
      "encode",
      [](const py::sequence& tuples, const std::vector<std::uint64_t>& keys, std::uint64_t first, unsigned threads,
         LeafHashes* hashes) {
        std::vector<Coding> codings = codings_of(tuples);
        for (std::size_t i = 0; i < codings.size(); ++i) codings[i].key = keys.at(i);
        const Found found = without_gil([&] { return encode(codings, first, threads, hashes); });
        return py::make_tuple(found.coding, found.negative, bytes_of(found.ties));
      },
      py::arg("codings"), py::arg("keys"), py::arg("first"), py::arg("threads"), py::arg("hashes"));
  py::class_<AdamUpdate>(module, "AdamUpdate")
      .def(py::init([](const py::sequence& codings, const std::vector<std::uint64_t>& keys, std::uint64_t first,
                       const AdamUpdate::Options& options, std::uintptr_t steps_taken) {
             auto* const steps = reinterpret_cast<float*>(steps_taken);
             return std::make_unique<AdamUpdate>(codings, keys, first, options, steps);
           }),
           py::arg("codings"), py::arg("keys"), py::arg("first"), py::arg("options"), py::arg("steps_taken"))
      .def("run", &AdamUpdate::run, py::arg("data"), py::arg("threads"), py::arg("hashes"));
  module.def("thread_count", &thread_count, py::arg("threads"));
}

// Of an address and a size in bytes, at which there is memory.
using SpanTuple = std::pair<std::uintptr_t, std::size_t>;

void bind_hashes(py::module_& module) {
  module.attr("LEAF_BYTES") = LeafHashes::kBytes;
  py::class_<LeafHashes>(module, "LeafHashes")
      .def(py::init([](std::uintptr_t data, std::size_t size) {
             return std::make_unique<LeafHashes>(reinterpret_cast<const void*>(data), size);
           }),
           py::arg("data"), py::arg("size"))
      .def(
          "add",
          [](LeafHashes& hashes, const std::vector<SpanTuple>& tuples, unsigned threads) {
            std::vector<std::span<const std::byte>> parts;
            for (const auto& [data, size] : tuples) parts.emplace_back(reinterpret_cast<const std::byte*>(data), size);
            without_gil([&] { hashes.add(parts, threads); });
          },
          py::arg("parts"), py::arg("threads"))
      .def(
          "finish",
          [](LeafHashes& hashes, unsigned threads) {
            const std::vector<std::uint64_t> all = without_gil([&] { return hashes.finish(threads); });
            return py::bytes(reinterpret_cast<const char*>(all.data()), all.size() * sizeof(std::uint64_t));
          },
          py::arg("threads"));
}

// Leaves [data, data + size), whole pages, out of children of fork().
void exclude_from_fork(std::uintptr_t data, std::size_t size) {
#ifdef MADV_DONTFORK
  ::madvise(reinterpret_cast<void*>(data), size, MADV_DONTFORK);
#endif
}

// Makes glibc's malloc serve temporary tensors from memory that it has; `size` is as much as it may well keep for them.
void settle_heap(std::size_t size) {
#ifdef __GLIBC__
  // A block that was mapped and is freed raises the size from which blocks are mapped to its own, and what the heap
  // keeps of its top to twice that (M_MMAP_THRESHOLD in mallopt(3)): no temporary is then mapped, or has its pages
  // taken when it is freed. Blocks above a limit do nothing of the kind; the rest is for malloc's own rounding.
  constexpr std::size_t kLimit = 4 * 1024 * 1024 * sizeof(long), kRounding = 64 * 1024;
  void* volatile block = std::malloc(std::min(size, kLimit - kRounding));
  std::free(block);
  // Before glibc 2.39, memalign() frees what it cuts off for an alignment of 64, chunks of 32 to 112 bytes, into
  // the thread's cache, where it is not joined to its neighbours: the hole that the tensor leaves then does not fit the
  // next one, and something small that stays may come to lie there. So what is cached is taken out, and the cache is
  // filled with other chunks (more than it keeps: some that malloc gives are of the next size); what is then freed, now
  // or by memalign(), goes where the next large block joins it to its neighbours.
  constexpr std::size_t kHeader = 8, kSmallest = 32, kLargest = 112, kSpacing = 16, kCached = 7;
  for (std::size_t chunk = kSmallest; chunk <= kLargest; chunk += kSpacing) {
    void* volatile cached[kCached];
    void* volatile others[2 * kCached];
    for (auto& each : cached) each = std::malloc(chunk - kHeader);
    for (auto& each : others) each = std::malloc(chunk - kHeader);
    for (auto& each : others) std::free(each);
    for (auto& each : cached) std::free(each);
  }
#else
  (void)size;
#endif
}

// Gives the pages of freed memory back to the system, where the allocator can.
void trim_heap() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

void raise_os_error(int error, const char* message, const std::string& path) {
  const py::str text(message);
  py::object name = py::none();
  if (!path.empty()) {
    name = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
  }
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error, text, name).ptr());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The native core of offload_opt. Use its Python faces: offload_opt.AioHandle, offload_opt.codecs.";

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const IoError& error) {
      raise_os_error(error.error, error.what(), error.path);
    } catch (const std::system_error& error) {
      raise_os_error(error.code().value(), error.what(), "");
    }
  });

  py::class_<PyOperation>(module, "Operation")
      .def("wait", &PyOperation::wait)
      .def_property_readonly("done", &PyOperation::done);

  py::class_<PyHandle>(module, "Handle")
      .def(py::init([](std::uint64_t block_size, unsigned queue_depth, bool single_submit, bool overlap_events,
                       unsigned num_threads, bool registered, const std::string& engine) {
             return std::make_unique<PyHandle>(
                 HandleConfig{block_size, queue_depth, single_submit, overlap_events, num_threads, registered}, engine);
           }),
           py::arg("block_size"), py::arg("queue_depth"), py::arg("single_submit"), py::arg("overlap_events"),
           py::arg("num_threads"), py::arg("registered"), py::arg("engine"))
      .def("submit", &PyHandle::submit, py::arg("write"), py::arg("data"), py::arg("length"), py::arg("path"),
           py::arg("fd"), py::arg("offset"), py::arg("validate"), py::arg("buffer"), py::arg("after"))
      .def("run_on_workers", &PyHandle::run_on_workers, py::arg("write"), py::arg("data"), py::arg("length"),
           py::arg("path"), py::arg("fd"), py::arg("offset"), py::arg("validate"), py::arg("buffer"))
      .def("run_here", &PyHandle::run_here, py::arg("write"), py::arg("data"), py::arg("length"), py::arg("path"),
           py::arg("fd"), py::arg("offset"), py::arg("validate"))
      .def("wait", &PyHandle::wait)
      .def("close", &PyHandle::close);

  py::class_<PyLockedMemory>(module, "LockedMemory", py::buffer_protocol())
      .def(py::init<std::size_t, py::object>(), py::arg("size"), py::arg("on_free") = py::none())
      .def_buffer([](PyLockedMemory& self) {
        return py::buffer_info(static_cast<std::uint8_t*>(self.memory->data()),
                               static_cast<py::ssize_t>(self.memory->size()));
      })
      .def_property_readonly(
          "address", [](const PyLockedMemory& self) { return reinterpret_cast<std::uintptr_t>(self.memory->data()); })
      .def_property_readonly("size", [](const PyLockedMemory& self) { return self.memory->size(); })
      .def_property_readonly("why_not_locked",
                             [](const PyLockedMemory& self) { return self.memory->why_not_locked(); });

  module.def("buffer_address", &buffer_address, py::arg("buffer"), py::arg("writable"));
  module.def("engines", &engines);
  module.def("direct_io", [](const std::string& folder) {
    std::string why_not;
    const std::uint64_t granule = without_gil([&] { return direct_io(folder, why_not); });
    return py::make_tuple(granule, why_not);
  });
  bind_codings(module);
  bind_hashes(module);
  ::pthread_atfork(nullptr, nullptr, &WithoutGil::forget_threads);
  module.def("prepare_to_exit", &WithoutGil::prepare_to_exit);
  module.def("page_size", &page_size);
  module.def("settle_heap", &settle_heap, py::arg("size"));
  module.def("trim_heap", &trim_heap);
  module.def("exclude_from_fork", &exclude_from_fork, py::arg("data"), py::arg("size"));
}
