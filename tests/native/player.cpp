#include "player.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <sstream>

namespace offload_opt {
namespace {

constexpr char kFill = '\x5a';  // what a buffer holds before it is read into

}  // namespace

std::string Settings::text() const {
  std::ostringstream out;
  out << engine->name << ", block_size " << config.block_size << ", queue_depth " << config.queue_depth
      << ", num_threads " << config.num_threads << ", single_submit " << config.single_submit << ", overlap_events "
      << config.overlap_events << ", registered " << config.registered << "; short " << faults.short_transfer
      << ", EINTR " << faults.interrupted << ", EAGAIN " << faults.again << ", EIO " << faults.io_error << ", ENOSPC "
      << faults.no_space << ", full " << faults.full << ", late " << faults.late << ", delayed " << faults.delayed
      << ", shuffled " << faults.shuffled;
  return out.str();
}

Player::Player(AioHandle& handle, const Settings& settings, const Folders& folders, std::uint64_t seed, bool alone)
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
Player::~Player() {
  for (const Step& step : steps_) {
    while (step.operation && !handle_.wait_for(*step.operation, std::chrono::milliseconds(100))) {
    }
  }
  for (const File& file : files_) ::unlink(file.path.c_str());
}

void Player::play() {
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

void Player::play_last() {
  start_round();
  handle_.close();
  for (const Step& step : steps_) CHECK(!step.operation || ended(*step.operation));
  wait_for_each();
  check_round();
}

std::unique_ptr<Arena> Player::new_arena() {
  const bool locked = draw_.chance(0.5);
  return std::make_unique<Arena>(locked, (draw_.chance(0.5) ? 128 : 1024) * 1024);
}

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

}  // namespace offload_opt
