// Seeded fault plans. A plan draws everything: the engine, the handle's settings, the faults and their chances (none,
// too), and rounds of operations on several files and buffers, many of them pending at once on ranges that do not
// overlap, some behind others. What came of them is held against a model: each operation moved exactly its bytes, or
// failed with an error that the plan can inject; no other byte of a file or of memory has changed; each operation ended
// once; and the handle goes on working.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <future>
#include <iostream>
#include <mutex>
#include <optional>
#include <sstream>
#include <system_error>
#include <thread>

#include "engine_fault.h"
#include "locked_memory.h"
#include "support.h"

namespace offload_opt {
namespace {

constexpr std::uint64_t kFileSize = 192 * 1024;  // no operation that should succeed reaches beyond
constexpr std::size_t kGap = 4096;               // bytes at least around each buffer, which must stay as they are
constexpr char kGuard = '\xee';
constexpr char kFill = '\x5a';  // what a buffer holds before it is read into
constexpr std::chrono::seconds kPatience{60};

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

  std::string text() const {
    std::ostringstream out;
    out << engine->name << ", block_size " << config.block_size << ", queue_depth " << config.queue_depth
        << ", num_threads " << config.num_threads << ", single_submit " << config.single_submit << ", overlap_events "
        << config.overlap_events << ", registered " << config.registered << "; short " << faults.short_transfer
        << ", EINTR " << faults.interrupted << ", EAGAIN " << faults.again << ", EIO " << faults.io_error << ", ENOSPC "
        << faults.no_space << ", full " << faults.full << ", late " << faults.late << ", delayed " << faults.delayed
        << ", shuffled " << faults.shuffled;
    return out.str();
  }
};

Settings draw_settings(Draw& draw) {
  static const std::vector<const EngineEntry*> engines = working_engines();  // probed once: a probe takes its time
  Settings settings{};
  settings.engine = engines.at(draw.between(0, engines.size() - 1));
  HandleConfig& config = settings.config;
  config.block_size = draw.chance(0.5) ? 4096 * draw.between(1, 16) : draw.between(1, draw.chance(0.1) ? 600 : 40'000);
  config.queue_depth = static_cast<unsigned>(draw.chance(0.2) ? 1 : draw.between(1, 24));
  config.num_threads = static_cast<unsigned>(draw.chance(0.5) ? 1 : draw.between(2, 4));
  config.single_submit = draw.chance(0.3);
  config.overlap_events = draw.chance(0.7);
  config.registered = draw.chance(0.7);
  FaultPlan& faults = settings.faults;
  faults.seed = draw.random();
  faults.short_transfer = draw.fault(0.5);
  faults.interrupted = draw.fault(0.15);
  faults.again = draw.fault(0.15);
  faults.io_error = draw.fault(draw.chance(0.5) ? 0.01 : 0.1);
  faults.no_space = draw.fault(draw.chance(0.5) ? 0.01 : 0.1);
  faults.full = draw.fault(0.5);
  faults.late = draw.fault(0.5);
  faults.delayed = draw.fault(0.5);
  faults.shuffled = draw.fault(1);
  return settings;
}

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
  Player(AioHandle& handle, const Settings& settings, const Folders& folders, std::uint64_t seed, bool alone)
      : handle_(handle), settings_(settings), draw_(seed), alone_(alone), arena_(new_arena()) {
    const std::uint64_t count = draw_.between(1, 2);
    for (std::uint64_t i = 0; i < count; ++i) {
      const fs::path& folder = folders.at(draw_.chance(0.7) ? 0 : folders.size() - 1);
      File file{folder / (std::to_string(seed) + "-" + std::to_string(i))};
      file.size = file.most = draw_.chance(0.3) ? 0 : draw_.place(kFileSize);
      draw_.fill(file.bytes.data(), file.size);
      std::ofstream(file.path, std::ios::binary | std::ios::trunc)
          .write(file.bytes.data(), static_cast<std::streamsize>(file.size));
      files_.push_back(std::move(file));
    }
  }
  // A check that fails leaves operations pending, whose memory goes now.
  ~Player() {
    for (const Step& step : steps_) {
      while (step.operation && !handle_.wait_for(*step.operation, std::chrono::milliseconds(100))) {
      }
    }
    for (const File& file : files_) ::unlink(file.path.c_str());
  }
  Player(const Player&) = delete;
  Player& operator=(const Player&) = delete;

  void play() {
    for (std::uint64_t rounds = draw_.between(1, 4); rounds > 0; --rounds) {
      if (draw_.chance(0.2)) {
        arena_.reset();  // first: the new one may then lie where the old one was
        arena_ = new_arena();
      }
      start_round();
      if (alone_ && draw_.chance(0.5)) {
        wait_for_all();
      } else {
        wait_for_each();
      }
      check_round();
    }
  }

  // Closes the handle over a round that is pending.
  void play_last() {
    start_round();
    handle_.close();
    for (const Step& step : steps_) CHECK(!step.operation || ended(*step.operation));
    wait_for_each();
    check_round();
  }

  Totals totals;
  std::uint64_t counted = 0;  // operations that finish_all() has not counted yet

 private:
  std::unique_ptr<Arena> new_arena() {
    const bool locked = draw_.chance(0.5);
    return std::make_unique<Arena>(locked, (draw_.chance(0.5) ? 128 : 1024) * 1024);
  }
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

// Cuts the files into ranges and starts a chain of operations on some of them.
void Player::start_round() {
  struct Range {
    std::size_t file;
    std::uint64_t begin, end;
  };
  std::vector<Range> ranges;
  for (std::size_t file = 0; file < files_.size(); ++file) {
    std::vector<std::uint64_t> cuts{0, kFileSize};
    for (std::uint64_t i = draw_.between(0, 4); i > 0; --i) cuts.push_back(draw_.place(kFileSize));
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t i = 1; i < cuts.size(); ++i) {
      if (draw_.chance(0.8)) ranges.push_back({file, cuts[i - 1], cuts[i]});
    }
  }
  std::shuffle(ranges.begin(), ranges.end(), draw_.random);
  for (const Range& range : ranges) start_chain(range.file, range.begin, range.end);
}

// One to three operations on parts of a range, each behind the one before it.
void Player::start_chain(std::size_t file, std::uint64_t begin, std::uint64_t end) {
  std::uint64_t readable = files_[file].size;  // there when the next step starts
  const std::uint64_t count = draw_.between(1, 3);
  for (std::uint64_t i = 0; i < count; ++i) {
    Step step;
    step.file = file;
    if (!draw_step(step, begin, end, readable)) return;
    const bool here = i == 0 && draw_.chance(0.15);
    if (!here) draw_extras(step, i == 0);
    if (step.direction == Direction::kWrite && step.length > 0) {
      readable = std::max(readable, step.offset + step.length);
    }
    submit(step, here);
    steps_.push_back(std::move(step));
    if (here || steps_.back().beyond) return;
  }
}

// Draws what is moved where. False when there is no memory left.
bool Player::draw_step(Step& step, std::uint64_t begin, std::uint64_t end, std::uint64_t readable) {
  step.direction = draw_.chance(0.55) || readable <= begin ? Direction::kWrite : Direction::kRead;
  const bool reading = step.direction == Direction::kRead;
  if (reading) end = std::min(end, readable);
  if (begin < end && draw_.chance(0.4)) begin += draw_.place(end - begin);
  if (begin < end && draw_.chance(0.3)) end = begin + draw_.place(end - begin);
  step.offset = begin;
  step.length = std::min(end - begin, settings_.config.block_size * 48);  // small blocks: not too many of them
  step.data = arena_->cut(step.length, draw_.chance(0.5) ? 0 : draw_.place(4096));
  if (step.data == nullptr) return false;
  if (reading) {
    std::memset(step.data, kFill, step.length);
  } else {
    step.bytes.resize(step.length);
    draw_.fill(step.bytes.data(), step.length);
    std::copy(step.bytes.begin(), step.bytes.end(), step.data);
  }
  step.validate = draw_.chance(0.15);
  return true;
}

void Player::draw_extras(Step& step, bool first) {
  step.counted = draw_.chance(0.9);
  if (!first) step.after.push_back(steps_.size() - 1);
  while (!steps_.empty() && draw_.chance(0.2)) {
    const std::size_t before = draw_.between(0, steps_.size() - 1);
    if (steps_[before].operation) step.after.push_back(before);
  }
  if (!step.after.empty() && step.direction == Direction::kRead && step.length > 0 && draw_.chance(0.05)) {
    step.beyond = true;
    step.offset = kFileSize;
  }
}

void Player::submit(Step& step, bool here) {
  TransferSpec transfer = spec(step.direction, step.data, step.length, step.offset, files_[step.file].path);
  transfer.validate = step.validate;
  transfer.counted = step.counted;
  for (const std::size_t before : step.after) transfer.after.push_back(steps_[before].operation);
  if (draw_.chance(0.1)) {
    transfer.fd = ::open(transfer.path.c_str(), O_RDWR | O_CLOEXEC);
    transfer.path.clear();
  }
  const int fd = transfer.fd;
  ++totals.operations;
  if (!here) {
    step.operation = handle_.submit(std::move(transfer));
    counted += step.counted ? 1 : 0;
  } else {
    try {
      CHECK(handle_.run(std::move(transfer)) == step.length);
    } catch (const IoError& error) {
      step.error = error;
    }
  }
  if (fd >= 0) ::close(fd);
}

// Nobody asks for the results of single operations, so the handle reports the first failure, and no count beside it.
void Player::wait_for_all() {
  while (!handle_.wait_for_all(std::chrono::milliseconds(100))) {
  }
  for (const Step& step : steps_) CHECK(!step.operation || ended(*step.operation));
  std::optional<IoError> reported;
  std::uint64_t count = 0;
  try {
    count = handle_.finish_all();
  } catch (const IoError& error) {
    reported = error;
  }
  wait_for_each();
  const auto is_reported = [&](const Step& step) {
    return step.operation && step.counted && step.error &&
           (!reported || step.error->what() == std::string(reported->what()));
  };
  CHECK(reported.has_value() == std::any_of(steps_.begin(), steps_.end(), is_reported));
  CHECK(reported || count == counted);
  CHECK(handle_.finish_all() == 0);
  counted = 0;
}

void Player::wait_for_each() {
  std::vector<Step*> order;
  for (Step& step : steps_) {
    if (step.operation) order.push_back(&step);
  }
  std::shuffle(order.begin(), order.end(), draw_.random);
  for (Step* step : order) {
    while (!handle_.wait_for(*step->operation, std::chrono::milliseconds(draw_.between(0, 50)))) {
    }
    try {
      CHECK(handle_.result(*step->operation) == step->length);
    } catch (const IoError& error) {
      step->error = error;
    }
  }
}

void Player::check_round() {
  for (Step& step : steps_) check_step(step);
  for (File& file : files_) check_file(file);
  arena_->check_and_clear();
  steps_.clear();
}

// Checks a step's error and its buffer, and brings the model up to it.
void Player::check_step(Step& step) {
  File& file = files_[step.file];
  const bool reading = step.direction == Direction::kRead;
  const bool called_off =
      std::any_of(step.after.begin(), step.after.end(), [&](std::size_t i) { return steps_[i].error.has_value(); });
  const int error = step.error ? step.error->error : 0;
  totals.failed += error != 0 ? 1 : 0;
  totals.cancelled += called_off ? 1 : 0;
  CHECK(called_off == (error == ECANCELED));
  CHECK(error == 0 || called_off || step.error->path == file.path || step.error->path.starts_with("<fd "));
  const FaultPlan& faults = settings_.faults;
  CHECK(step.beyond ? error == ENODATA || called_off
                    : error == 0 || called_off || (error == EIO && faults.io_error > 0) ||
                          (error == ENOSPC && !reading && faults.no_space > 0));
  if (!reading) {
    CHECK(std::equal(step.bytes.begin(), step.bytes.end(), step.data));
    if (called_off) return;
    const std::uint64_t end = step.length > 0 ? step.offset + step.length : 0;
    file.most = std::max(file.most, end);
    if (error != 0) {
      file.failed_writes.push_back(&step);
    } else {
      std::copy(step.bytes.begin(), step.bytes.end(), file.bytes.begin() + static_cast<std::ptrdiff_t>(step.offset));
      file.size = std::max(file.size, end);
    }
    return;
  }
  const char* const expected = file.bytes.data() + (step.beyond ? 0 : step.offset);
  const bool unchanged = called_off || step.beyond;
  for (std::uint64_t i = 0; i < step.length; ++i) {
    if (step.data[i] == expected[i] && !unchanged) continue;
    CHECK(error != 0 && step.data[i] == kFill);
  }
}

void Player::check_file(File& file) {
  Bytes actual(fs::file_size(file.path));
  std::ifstream(file.path, std::ios::binary).read(actual.data(), static_cast<std::streamsize>(actual.size()));
  CHECK(actual.size() >= file.size && actual.size() <= file.most);
  file.size = file.most = actual.size();
  actual.resize(kFileSize);
  for (const Step* step : file.failed_writes) {
    for (std::uint64_t i = 0; i < step->length; ++i) {
      char& byte = file.bytes[step->offset + i];
      if (actual[step->offset + i] == step->bytes[i]) byte = step->bytes[i];
    }
  }
  file.failed_writes.clear();
  CHECK(actual == file.bytes);
}

// What all processes together may take of fs.aio-max-nr may be gone for a moment: that is no fault of the plan.
std::unique_ptr<IoEngine> make_engine(const EngineEntry& entry, unsigned depth) {
  for (int tries = 0;; ++tries) {
    try {
      return entry.make(depth);
    } catch (const std::system_error& error) {
      if (error.code().value() != EAGAIN || tries == 1000) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
}

Totals run_plan(const Settings& settings, Draw& draw, const Folders& folders) {
  std::atomic<std::uint64_t> engines{0};
  AioHandle handle(settings.config, [&](unsigned depth) {
    FaultPlan faults = settings.faults;
    faults.seed += engines++;
    return make_fault_engine(make_engine(*settings.engine, depth), faults);
  });
  const bool alone = draw.chance(0.75);
  Player player(handle, settings, folders, draw.random(), alone);
  Totals totals;
  if (alone) {
    player.play();
  } else {
    Player other(handle, settings, folders, draw.random(), alone);
    auto others = std::async(std::launch::async, [&] { other.play(); });
    player.play();
    others.get();
    player.counted += other.counted;
    totals = other.totals;
  }
  if (draw.chance(0.3)) player.play_last();
  CHECK(handle.wait_for_all(std::chrono::milliseconds(0)));
  CHECK(handle.finish_all() == player.counted);
  return {totals.operations + player.totals.operations, totals.failed + player.totals.failed,
          totals.cancelled + player.totals.cancelled};
}

// Ends the process when a plan hangs.
class Watchdog {
 public:
  Watchdog() : thread_([this] { watch(); }) {}
  ~Watchdog() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  // Something is alive; `what` is to be printed if nothing is heard for too long from here on.
  void begin(const std::string& what) {
    std::lock_guard lock(mutex_);
    ++begun_;
    what_ = what;
  }

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      const std::uint64_t before = begun_;
      changed_.wait_for(lock, kPatience, [this] { return stopping_; });
      if (stopping_ || begun_ != before) continue;
      std::cerr << "HANGS " << what_ << std::endl;
      std::abort();
    }
  }

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::uint64_t begun_ = 0;
  std::string what_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace

bool run_plans(const Folders& folders, std::uint64_t first, std::uint64_t count, const std::string& command) {
  Watchdog watchdog;
  Totals totals;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    Draw draw(seed);
    const Settings settings = draw_settings(draw);
    const std::string what = "plan " + std::to_string(seed) + "; repeat it with: " + command + " " +
                             std::to_string(seed) + " 1\n      " + settings.text();
    watchdog.begin(what);
    try {
      const Totals plan = run_plan(settings, draw, folders);
      totals.operations += plan.operations;
      totals.failed += plan.failed;
      totals.cancelled += plan.cancelled;
    } catch (const std::exception& error) {
      std::cout << "FAIL  " << what << "\n      " << error.what() << std::endl;
      return false;
    }
  }
  std::cout << count << " plans held: " << totals.operations << " operations, of which "
            << totals.failed - totals.cancelled << " met an error and " << totals.cancelled << " were called off"
            << std::endl;
  // Many plans in which nothing fails, or all, have tested nothing.
  return count < 100 || (totals.failed > totals.cancelled && totals.failed < totals.operations / 2);
}

}  // namespace offload_opt
