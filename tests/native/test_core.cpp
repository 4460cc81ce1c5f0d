// Drives the native core without Python, so that the sanitizers see all of it.
//   test_core [FOLDER] [SEED]               the tests below, on every engine
//   test_core FOLDER --plans FIRST COUNT    seeded fault plans, see test_plans.cpp
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "aio_handle.h"
#include "engine_fault.h"
#include "locked_memory.h"
#include "support.h"

using namespace offload_opt;

namespace {

fs::path folder;
std::uint64_t seed = 1;

// Random sizes, offsets and alignments through page-aligned memory, written, read back, and compared with a model.
void round_trips(const EngineEntry& engine, const EngineFactory& factory, int rounds, const fs::path& path) {
  std::mt19937_64 random(seed);
  const auto pick = [&](std::uint64_t low, std::uint64_t high) {
    return std::uniform_int_distribution<std::uint64_t>(low, high)(random);
  };
  (void)engine;
  for (int round = 0; round < rounds; ++round) {
    HandleConfig config;
    config.block_size = pick(0, 1) ? 4096 * pick(1, 16) : pick(1, 40000);
    config.queue_depth = static_cast<unsigned>(pick(1, 16));
    config.num_threads = static_cast<unsigned>(pick(1, 4));
    config.single_submit = pick(0, 1) == 1;
    config.overlap_events = pick(0, 1) == 1;
    AioHandle handle(config, factory);
    fs::remove(path);
    Bytes model(600'000);
    LockedMemory memory(1 << 20);
    char* const data = static_cast<char*>(memory.data());
    for (int i = 0; i < 6; ++i) {
      const std::uint64_t align = pick(0, 1) ? 4096 : 1;
      const std::uint64_t offset = pick(0, 300'000) / align * align;
      const std::uint64_t length = pick(0, 250'000) / align * align;
      char* const from = data + pick(0, 1) * pick(0, 4096);
      const Bytes bytes = random_bytes(random, length);
      std::memcpy(from, bytes.data(), length);
      std::memcpy(model.data() + offset, bytes.data(), length);
      TransferSpec write = spec(Direction::kWrite, from, length, offset, path);
      write.validate = pick(0, 3) == 0;
      CHECK(finish(handle, handle.submit(write)) == length);
      std::memset(from, 0x5a, length);
      CHECK(finish(handle, handle.submit(spec(Direction::kRead, from, length, offset, path))) == length);
      CHECK(std::memcmp(from, bytes.data(), length) == 0);
      std::memset(from, 0x5a, length);
      CHECK(handle.run(spec(Direction::kRead, from, length, offset, path)) == length);
      CHECK(std::memcmp(from, bytes.data(), length) == 0);
    }
    const std::uint64_t size = fs::exists(path) ? fs::file_size(path) : 0;
    if (size == 0) continue;
    CHECK(finish(handle, handle.submit(spec(Direction::kRead, data, size, 0, path))) == size);
    CHECK(std::memcmp(data, model.data(), size) == 0);
    CHECK(handle.wait_for_all(std::chrono::milliseconds(0)));
    CHECK(handle.finish_all() == 13);
  }
}

void errors(const EngineEntry& engine) {
  AioHandle handle({}, engine.make);
  const fs::path path = folder / "errors";
  char data[8192] = {};
  CHECK(error_of([&] { handle.submit(spec(Direction::kRead, data, 1, 0, folder / "missing")); }) == ENOENT);
  CHECK(handle.run(spec(Direction::kWrite, data, 5000, 0, path)) == 5000);
  CHECK(error_of([&] { handle.submit(spec(Direction::kRead, data, 5001, 0, path)); }) == ENODATA);
  CHECK(error_of([&] { handle.run(spec(Direction::kRead, data, 1, 5000, path)); }) == ENODATA);
  bool beyond = false;
  try {
    handle.submit(spec(Direction::kRead, data, UINT64_MAX, 1, path));
  } catch (const std::invalid_argument&) {
    beyond = true;
  }
  CHECK(beyond);
  TransferSpec by_descriptor = spec(Direction::kWrite, data, 1, 0, "");
  by_descriptor.fd = 9999;
  CHECK(error_of([&] { handle.submit(by_descriptor); }) == EBADF);
  by_descriptor.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(error_of([&] { handle.submit(by_descriptor); }) == EBADF);
  ::close(by_descriptor.fd);
  // Without offsets a transfer could wait for ever.
  int sockets[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
  for (const int fd : {::eventfd(0, EFD_CLOEXEC), ::posix_openpt(O_RDWR | O_NOCTTY), sockets[0], sockets[1]}) {
    if (fd < 0) continue;  // no terminals here
    for (const Direction direction : {Direction::kRead, Direction::kWrite}) {
      TransferSpec waiting = spec(direction, data, 8, 0, "");
      waiting.fd = fd;
      CHECK(error_of([&] { handle.submit(waiting); }) == ESPIPE);
      CHECK(error_of([&] { handle.run(waiting); }) == ESPIPE);
    }
    ::close(fd);
  }
  CHECK(handle.finish_all() == 0);
  handle.close();
  handle.close();
  bool refused = false;
  try {
    handle.submit(spec(Direction::kRead, data, 1, 0, path));
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

// Operations that wait for others run in order; behind a failed one they are not started, and say so.
void chains(const EngineEntry& engine) {
  HandleConfig config;
  config.block_size = 4096;
  config.num_threads = 3;
  AioHandle handle(config, engine.make);
  const fs::path path = folder / "chain";
  LockedMemory memory(64 * 4096);
  char* const data = static_cast<char*>(memory.data());
  Bytes out(64 * 4096);
  OperationPtr last;
  for (int i = 0; i < 50; ++i) {
    std::vector<OperationPtr> after;
    if (last) after.push_back(last);
    // Each round writes what the round before it read, so an order that slips is a difference.
    TransferSpec write = spec(Direction::kWrite, data, memory.size(), 0, path);
    write.after = after;
    const OperationPtr written = handle.submit(write);
    TransferSpec read = spec(Direction::kRead, data, memory.size(), 0, path);
    read.after = {written};
    last = handle.submit(read);
  }
  CHECK(finish(handle, last) == memory.size());
  CHECK(handle.wait_for_all(std::chrono::seconds(10)));
  CHECK(handle.finish_all() == 100);

  TransferSpec beyond = spec(Direction::kRead, data, 4096, memory.size(), path);
  beyond.after = {last};  // checked only when it starts
  const OperationPtr fails = handle.submit(beyond);
  TransferSpec behind = spec(Direction::kWrite, out.data(), out.size(), 0, path);
  behind.after = {fails};
  const OperationPtr cancelled = handle.submit(behind);
  CHECK(error_of([&] { finish(handle, cancelled); }) == ECANCELED);
  CHECK(error_of([&] { handle.finish_all(); }) == ENODATA);
  CHECK(handle.finish_all() == 0);

  // A long chain that is called off must not use up the stack.
  TransferSpec slow = spec(Direction::kWrite, data, memory.size(), 0, path);
  OperationPtr before = handle.submit(slow);
  beyond.after = {before};
  before = handle.submit(beyond);
  for (int i = 0; i < 300; ++i) {
    TransferSpec next = spec(Direction::kRead, data, 0, 0, path);
    next.after = {before};
    before = handle.submit(next);
  }
  CHECK(error_of([&] { finish(handle, before); }) == ECANCELED);
  CHECK(error_of([&] { handle.finish_all(); }) == ENODATA);
}

// Every fault ends in the right bytes or in an error.
void faults(const EngineEntry& engine) {
  FaultPlan plan;
  plan.seed = seed;
  plan.short_transfer = 0.3;
  plan.interrupted = 0.1;
  plan.again = 0.1;
  const auto with_plan = [&](unsigned depth) {
    ++plan.seed;
    return make_fault_engine(engine.make(depth), plan);
  };
  round_trips(engine, with_plan, 15, folder / "faults");

  plan.io_error = 0.004;
  plan.no_space = 0.004;
  HandleConfig config;
  config.block_size = 4096;
  config.num_threads = 2;
  std::mt19937_64 random(seed);
  LockedMemory memory(64 * 4096);
  int right = 0;
  int failed = 0;
  for (int i = 0; i < 60; ++i) {
    AioHandle handle(config, with_plan);
    const Bytes bytes = random_bytes(random, memory.size() - 7);
    std::memcpy(memory.data(), bytes.data(), bytes.size());
    const fs::path path = folder / "faulty";
    const int write_error =
        error_of([&] { finish(handle, handle.submit(spec(Direction::kWrite, memory.data(), bytes.size(), 0, path))); });
    std::memset(memory.data(), 0x5a, memory.size());
    const int read_error = write_error != 0 ? 0 : error_of([&] {
      finish(handle, handle.submit(spec(Direction::kRead, memory.data(), bytes.size(), 0, path)));
    });
    const int error = write_error != 0 ? write_error : read_error;
    CHECK(error == 0 || error == EIO || error == ENOSPC);
    if (error == 0) CHECK(std::memcmp(memory.data(), bytes.data(), bytes.size()) == 0);
    ++(error == 0 ? right : failed);
  }
  CHECK(right > 0 && failed > 0);
}

void truncated_under_the_reader(const EngineEntry& engine) {
  const fs::path path = folder / "truncated";
  Bytes bytes(1 << 20);
  HandleConfig config;
  config.block_size = 4096;
  config.queue_depth = 2;
  AioHandle handle(config, engine.make);
  for (int i = 0; i < 20; ++i) {
    CHECK(handle.run(spec(Direction::kWrite, bytes.data(), bytes.size(), 0, path)) == bytes.size());
    const OperationPtr reading = handle.submit(spec(Direction::kRead, bytes.data(), bytes.size(), 0, path));
    fs::resize_file(path, 5000);
    const int error = error_of([&] { CHECK(finish(handle, reading) == bytes.size()); });
    CHECK(error == 0 || error == ENODATA);
  }
  const auto no_error_left = error_of([&] { handle.finish_all(); });
  CHECK(no_error_left == 0);
}

// Requests that lie one behind the other, which an engine may do in one call, get each its own result: in full, short
// at the end of the file, nothing behind it, an error.
void adjacent_requests(const EngineEntry& entry) {
  constexpr std::uint32_t kLength = 4096;
  constexpr unsigned kCount = 8;
  std::mt19937_64 random(seed);
  for (int round = 0; round < 50; ++round) {
    const std::uint64_t size = random() % (kLength * (kCount + 1));
    const Bytes bytes = random_bytes(random, size);
    const fs::path path = folder / "adjacent";
    std::FILE* made = std::fopen(path.c_str(), "wb");
    CHECK(std::fwrite(bytes.data(), 1, size, made) == size && std::fclose(made) == 0);
    const int fd = ::open(path.c_str(), O_RDONLY);
    const auto engine = entry.make(kCount);
    Bytes back(kLength * kCount);
    const auto run = [&](Direction direction) {
      std::vector<IoRequest> requests;
      for (unsigned i = 0; i < kCount; ++i) {
        requests.push_back({direction, fd, back.data() + i * kLength, kLength, i * kLength, i});
      }
      CHECK(engine->submit(requests) == kCount);
      std::vector<std::int64_t> results(kCount, -1);
      std::vector<IoCompletion> completions(kCount);
      for (unsigned ended = 0; ended < kCount;) {
        const unsigned count = engine->reap(1, completions);
        for (unsigned i = 0; i < count; ++i) results.at(completions[i].tag) = completions[i].res;
        ended += count;
      }
      return results;
    };
    const auto moved = run(Direction::kRead);
    for (unsigned i = 0; i < kCount; ++i) {
      const std::uint64_t start = i * kLength;
      CHECK(moved[i] == static_cast<std::int64_t>(start < size ? std::min<std::uint64_t>(kLength, size - start) : 0));
    }
    CHECK(std::equal(back.begin(), back.begin() + static_cast<std::ptrdiff_t>(std::min(size, back.size())),
                     bytes.begin()));
    for (const std::int64_t res : run(Direction::kWrite)) CHECK(res == -EBADF);
    ::close(fd);
  }
}

void many_threads_on_one_handle(const EngineEntry& engine) {
  HandleConfig config;
  config.block_size = 4096;
  config.num_threads = 2;
  AioHandle handle(config, engine.make);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const fs::path path = folder / ("shared-" + std::to_string(t));
      std::mt19937_64 random(seed + static_cast<unsigned>(t));
      for (int i = 0; i < 20; ++i) {
        const Bytes bytes = random_bytes(random, 50'000);
        Bytes back(bytes.size());
        Bytes source = bytes;
        const OperationPtr written = handle.submit(spec(Direction::kWrite, source.data(), source.size(), 0, path));
        TransferSpec read = spec(Direction::kRead, back.data(), back.size(), 0, path);
        read.after = {written};
        finish(handle, handle.submit(read));
        if (back != bytes) ++wrong;
        if (handle.run(spec(Direction::kRead, back.data(), back.size(), 0, path)) != bytes.size()) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
}

// The blocks of a large file and of many others go to the engine together. One that keeps a few files registered must
// not give a place away while a request that names it waits to be started.
void many_files_at_once(const EngineEntry& engine) {
  constexpr std::size_t kBlock = 4096;
  constexpr std::size_t kFiles = 24;
  HandleConfig config;
  config.block_size = kBlock;
  config.queue_depth = 128;
  AioHandle handle(config, engine.make);
  std::mt19937_64 random(seed);
  LockedMemory memory(100 * kBlock);
  LockedMemory others(kFiles * kBlock);
  for (int round = 0; round < 10; ++round) {
    const Bytes bytes = random_bytes(random, memory.size());
    std::memcpy(memory.data(), bytes.data(), bytes.size());
    std::memcpy(others.data(), bytes.data(), kFiles * kBlock);
    // All wait for one, and so are queued at the same moment.
    const OperationPtr first = handle.submit(spec(Direction::kWrite, memory.data(), kBlock, 0, folder / "first"));
    TransferSpec write = spec(Direction::kWrite, memory.data(), memory.size(), 0, folder / "large");
    write.after = {first};
    const OperationPtr large = handle.submit(write);
    for (std::size_t i = 0; i < kFiles; ++i) {
      char* const data = static_cast<char*>(others.data()) + i * kBlock;
      write = spec(Direction::kWrite, data, kBlock, 0, folder / ("small-" + std::to_string(i)));
      write.after = {first};
      handle.submit(write);
    }
    CHECK(finish(handle, large) == memory.size());
    CHECK(handle.wait_for_all(std::chrono::seconds(60)));
    CHECK(handle.finish_all() == kFiles + 2);
    std::memset(memory.data(), 0, memory.size());
    CHECK(handle.run(spec(Direction::kRead, memory.data(), memory.size(), 0, folder / "large")) == memory.size());
    CHECK(std::memcmp(memory.data(), bytes.data(), memory.size()) == 0);
    for (std::size_t i = 0; i < kFiles; ++i) {
      Bytes back(kBlock);
      const fs::path path = folder / ("small-" + std::to_string(i));
      CHECK(handle.run(spec(Direction::kRead, back.data(), kBlock, 0, path)) == kBlock);
      CHECK(std::memcmp(back.data(), bytes.data() + i * kBlock, kBlock) == 0);
    }
  }
}

void pending_work_at_the_end(const EngineEntry& engine) {
  Bytes bytes(4 << 20, 'x');
  const fs::path path = folder / "pending";
  {
    AioHandle handle({}, engine.make);
    for (int i = 0; i < 4; ++i) {
      handle.submit(spec(Direction::kWrite, bytes.data(), bytes.size(), static_cast<std::uint64_t>(i) << 22, path));
    }
  }
  CHECK(fs::file_size(path) == 16u << 20);

  AioHandle handle({}, engine.make);
  const OperationPtr written = handle.submit(spec(Direction::kWrite, bytes.data(), bytes.size(), 0, path));
  const pid_t child = ::fork();
  if (child == 0) {
    // The child has no workers: using the handle is an error there, closing it is not.
    bool refused = false;
    try {
      handle.submit(spec(Direction::kRead, bytes.data(), 1, 0, path));
    } catch (const std::runtime_error&) {
      refused = true;
    }
    handle.close();
    ::_exit(refused ? 0 : 1);
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(finish(handle, written) == bytes.size());
}

// An engine of just this depth whose completions are not told as long as `stuck` is set.
class StuckEngine final : public IoEngine {
 public:
  StuckEngine(const EngineEntry& engine, unsigned depth, const std::atomic<bool>& stuck)
      : inner_(engine.make(depth)), depth_(depth), stuck_(stuck) {}
  unsigned submit(std::span<const IoRequest> requests) override {
    const unsigned taken = inner_->submit(requests);
    for (const IoRequest& request : requests.first(taken)) offsets.push_back(request.offset);
    return taken;
  }
  unsigned reap(unsigned min, std::span<IoCompletion> completions) override {
    while (stuck_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return inner_->reap(min, completions);
  }
  EngineCapabilities capabilities() const override { return {depth_}; }

  std::vector<std::uint64_t> offsets;  // of the requests, in their order; the handle's thread writes it

 private:
  std::unique_ptr<IoEngine> inner_;
  const unsigned depth_;
  const std::atomic<bool>& stuck_;
};

// Each device has a queue of its own: one that is stuck does not hold up another.
void a_stuck_device(const EngineEntry& engine) {
  const fs::path other = fs::path("/dev/shm") / folder.filename();
  struct stat here{};
  struct stat there{};
  CHECK(::stat(folder.c_str(), &here) == 0);
  if (::stat(other.parent_path().c_str(), &there) != 0 || here.st_dev == there.st_dev) return;  // one device only
  fs::create_directories(other);
  std::atomic<bool> stuck{true};
  int made = 0;
  const auto first_one_stuck = [&](unsigned depth) -> std::unique_ptr<IoEngine> {
    if (made++ > 0) return engine.make(depth);
    return std::make_unique<StuckEngine>(engine, depth, stuck);
  };
  {
    AioHandle handle({}, first_one_stuck);
    Bytes bytes(100'000, 'x');
    Bytes back(bytes.size());
    const OperationPtr held = handle.submit(spec(Direction::kWrite, bytes.data(), bytes.size(), 0, folder / "stuck"));
    for (int i = 0; i < 10; ++i) {
      finish(handle, handle.submit(spec(Direction::kWrite, bytes.data(), bytes.size(), 0, other / "file")));
      finish(handle, handle.submit(spec(Direction::kRead, back.data(), back.size(), 0, other / "file")));
      CHECK(back == bytes);
    }
    CHECK(!ended(*held));
    stuck = false;
    CHECK(finish(handle, held) == bytes.size());
  }
  fs::remove_all(other);
}

// What has waited for an operation goes before what was submitted after it.
void order_of_submission(const EngineEntry& engine) {
  constexpr std::uint64_t kBlock = 4096;
  const fs::path path = folder / "order";
  Bytes bytes(kBlock, 'x');
  std::atomic<bool> stuck{true};
  StuckEngine* log = nullptr;
  AioHandle handle({.block_size = kBlock, .queue_depth = 1}, [&](unsigned depth) {
    auto made = std::make_unique<StuckEngine>(engine, depth, stuck);
    log = made.get();
    return made;
  });
  const struct Unstick {
    std::atomic<bool>& stuck;
    ~Unstick() { stuck = false; }
  } before_the_handle_closes{stuck};
  const auto write = [&](std::uint64_t block, std::vector<OperationPtr> after) {
    TransferSpec transfer = spec(Direction::kWrite, bytes.data(), kBlock, block * kBlock, path);
    transfer.after = std::move(after);
    return handle.submit(std::move(transfer));
  };
  const OperationPtr first = write(0, {});
  const OperationPtr second = write(1, {first});
  const OperationPtr third = write(2, {second});
  const OperationPtr independent = write(3, {});
  stuck = false;
  for (const OperationPtr& operation : {first, second, third, independent}) finish(handle, operation);
  CHECK(log->offsets == (std::vector<std::uint64_t>{0, kBlock, 2 * kBlock, 3 * kBlock}));
}

// Every test on every engine. Returns whether all have passed.
bool run_tests() {
  struct Test {
    const char* name;
    std::function<void(const EngineEntry&)> run;
  };
  const std::vector<Test> tests = {
      {"round_trips", [](const EngineEntry& e) { round_trips(e, e.make, 40, folder / "round"); }},
      {"errors", errors},
      {"chains", chains},
      {"faults", faults},
      {"truncated_under_the_reader", truncated_under_the_reader},
      {"adjacent_requests", adjacent_requests},
      {"many_threads_on_one_handle", many_threads_on_one_handle},
      {"many_files_at_once", many_files_at_once},
      {"pending_work_at_the_end", pending_work_at_the_end},
      {"a_stuck_device", a_stuck_device},
      {"order_of_submission", order_of_submission},
  };
  int passed = 0;
  int failed = 0;
  const auto count = [&](const char* engine, const char* name, const auto& run) {
    try {
      run();
      ++passed;
      std::cout << "ok    " << engine << " " << name << std::endl;
    } catch (const std::exception& error) {
      ++failed;
      std::cout << "FAIL  " << engine << " " << name << ": " << error.what() << std::endl;
    }
  };
  count("no engine", "adam", [] { check_adam(seed); });
  count("no engine", "codecs", [] { check_codecs(seed); });
  count("no engine", "leaf_hashes", [] { check_leaf_hashes(seed); });
  for (const EngineEntry* engine : engine_table()) {
    std::string why_not;
    if (!engine->available(why_not)) {
      std::cout << engine->name << " is not available: " << why_not << "\n";
      continue;
    }
    for (const Test& test : tests) count(engine->name, test.name, [&] { test.run(*engine); });
  }
  std::cout << passed << " passed, " << failed << " failed\n";
  return failed == 0 && passed > 2;  // two pass where there is no engine, too
}

}  // namespace

int main(int argc, char** argv) {
  const std::string parent = argc > 1 ? argv[1] : ".";
  const std::string name = "offload_opt_core_" + std::to_string(::getpid());
  folder = fs::path(parent) / name;
  fs::create_directories(folder);
  bool held;
  if (argc == 5 && std::string(argv[2]) == "--plans") {
    Folders folders{folder};
    const fs::path other_device = "/dev/shm";
    if (fs::is_directory(other_device)) fs::create_directory(folders.emplace_back(other_device / name));
    const std::string command = std::string(argv[0]) + " " + parent + " --plans";
    held = run_plans(folders, std::strtoull(argv[3], nullptr, 10), std::strtoull(argv[4], nullptr, 10), command);
    fs::remove_all(folders.back());
  } else {
    if (argc > 2) seed = std::strtoull(argv[2], nullptr, 10);
    std::cout << "seed " << seed << ", files in " << folder << "\n";
    held = run_tests();
  }
  fs::remove_all(folder);
  return held ? 0 : 1;
}
