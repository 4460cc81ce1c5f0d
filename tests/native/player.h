// A player draws rounds of operations on files of its own, plays them on a handle, and checks what came of them against
// a model of the files. See test_plans.cpp.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine_fault.h"
#include "locked_memory.h"
#include "support.h"

namespace offload_opt {

constexpr std::uint64_t kFileSize = 192 * 1024;  // no operation that should succeed reaches beyond
constexpr std::size_t kGap = 4096;               // bytes at least around each buffer, which must stay as they are
constexpr char kGuard = '\xee';

struct Totals {
  std::uint64_t operations = 0, failed = 0, cancelled = 0;
};

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : random(seed) {}
  bool chance(double probability) { return std::uniform_real_distribution<>(0, 1)(random) < probability; }
  std::uint64_t between(std::uint64_t low, std::uint64_t high) {
    return std::uniform_int_distribution<std::uint64_t>(low, high)(random);
  }
  // A value below `end`, on a granule, on a sector, or anywhere.
  std::uint64_t place(std::uint64_t end) {
    const std::uint64_t unit = chance(0.4) ? 4096 : chance(0.4) ? 512 : 1;
    return between(0, end - 1) / unit * unit;
  }
  // Half of the time none at all.
  double fault(double most) { return chance(0.5) ? 0 : std::uniform_real_distribution<>(0, most)(random); }
  void fill(char* data, std::size_t size) {
    for (std::size_t i = 0; i < size; i += 8) {
      const std::uint64_t word = random();
      std::memcpy(data + i, &word, std::min<std::size_t>(8, size - i));
    }
  }

  std::mt19937_64 random;
};

// Page-aligned memory that buffers are cut from, with guard bytes between them. Locked memory may get registered with
// the kernel: the sooner, the smaller it is.
class Arena {
 public:
  Arena(bool locked, std::size_t size) : size_(size) {
    if (locked) {
      locked_.emplace(size);
      data_ = static_cast<char*>(locked_->data());
    } else {
      owned_.reset(static_cast<char*>(std::aligned_alloc(page_size(), size)));
      data_ = owned_.get();
    }
    std::memset(data_, kGuard, kGap);
  }

  // `length` bytes that begin `shift` bytes behind a page's start; null when there is no room.
  char* cut(std::size_t length, std::size_t shift) {
    const std::size_t begin = (used_ + kGap + page_size() - 1) / page_size() * page_size() + shift;
    const std::size_t end = begin + length;
    if (end + kGap > size_) return nullptr;
    std::memset(data_ + used_, kGuard, begin - used_);
    std::memset(data_ + end, kGuard, kGap);
    buffers_.emplace_back(begin, end);
    used_ = end;
    return data_ + begin;
  }

  // Checks the bytes around the buffers, and takes the buffers back.
  void check_and_clear() {
    std::size_t at = 0;
    for (const auto& [begin, end] : buffers_) {
      CHECK(is_guard(at, begin));
      at = end;
    }
    CHECK(is_guard(at, at + kGap));
    buffers_.clear();
    used_ = 0;
    std::memset(data_, kGuard, kGap);
  }

 private:
  bool is_guard(std::size_t begin, std::size_t end) const {
    return begin == end ||
           (data_[begin] == kGuard && std::memcmp(data_ + begin, data_ + begin + 1, end - begin - 1) == 0);
  }

  const std::size_t size_;
  std::optional<LockedMemory> locked_;
  std::unique_ptr<char, void (*)(void*)> owned_{nullptr, std::free};
  char* data_;
  std::size_t used_ = 0;
  std::vector<std::pair<std::size_t, std::size_t>> buffers_;  // from, to
};

struct Settings {
  const EngineEntry* engine;
  HandleConfig config;
  FaultPlan faults;

  std::string text() const;
};

// One operation of a round.
struct Step {
  Direction direction{};
  std::size_t file = 0;
  std::uint64_t offset = 0, length = 0;
  char* data = nullptr;
  Bytes bytes{};        // what is written
  bool beyond = false;  // reads what no file has
  bool validate = false, counted = true;
  std::vector<std::size_t> after{};  // steps of the same round
  OperationPtr operation{};          // null when it ran on this thread
  std::optional<IoError> error{};
};

// What a file should hold. Bytes behind its end are zero, as they are once something is written behind them.
struct File {
  fs::path path;
  Bytes bytes = Bytes(kFileSize);
  std::uint64_t size = 0;
  std::uint64_t most = 0;                    // as large as a failed write may have made it
  std::vector<const Step*> failed_writes{};  // of this round: their ranges hold old or new bytes
};

// Draws rounds of operations on files of its own, and checks them. Several players may share a handle.
class Player {
 public:
  Player(AioHandle& handle, const Settings& settings, const Folders& folders, std::uint64_t seed, bool alone);
  ~Player();
  Player(const Player&) = delete;
  Player& operator=(const Player&) = delete;

  void play();
  // Closes the handle over a round that is pending.
  void play_last();

  Totals totals;
  std::uint64_t counted = 0;  // operations that finish_all() has not counted yet

 private:
  std::unique_ptr<Arena> new_arena();
  void start_round();
  void start_chain(std::size_t file, std::uint64_t begin, std::uint64_t end);
  bool draw_step(Step& step, std::uint64_t begin, std::uint64_t end, std::uint64_t readable);
  void draw_extras(Step& step, bool first);
  void submit(Step& step, bool here);
  void wait_for_all();
  void wait_for_each();
  void check_round();
  void check_step(Step& step);
  void check_file(File& file);

  AioHandle& handle_;
  const Settings& settings_;
  Draw draw_;
  const bool alone_;  // nobody else uses the handle
  std::unique_ptr<Arena> arena_;
  std::vector<File> files_;
  std::vector<Step> steps_;
};

}  // namespace offload_opt
