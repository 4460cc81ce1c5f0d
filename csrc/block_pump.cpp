#include "block_pump.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <iterator>
#include <thread>

namespace offload_opt {
namespace {

// A request that moves nothing this often in a row (EAGAIN, or zero bytes written) is given up: about ten seconds.
constexpr unsigned kMaxAttempts = 1000;

void back_off(unsigned attempts) {
  if (attempts > 2) std::this_thread::sleep_for(std::chrono::microseconds(std::min(10'000u, 100u * attempts)));
}

}  // namespace

void Operation::fail(IoError error) {
  std::lock_guard lock(error_mutex_);
  if (error_) return;
  error_.emplace(std::move(error));
  failed_.store(true, std::memory_order_release);
}

BlockPump::BlockPump(const HandleConfig& config, std::unique_ptr<IoEngine> engine, SpanEnded span_ended)
    : config_(config), engine_(std::move(engine)), span_ended_(std::move(span_ended)) {
  const unsigned depth = engine_->capabilities().depth;
  blocks_.resize(depth);
  completions_.resize(depth);
  for (unsigned slot = depth; slot > 0; --slot) free_.push_back(slot - 1);
}

void BlockPump::add(Span span) {
  const std::uint64_t number = span.operation->number;
  auto behind = spans_.end();
  if (!spans_.empty() && number < spans_.front().operation->number) {
    behind = spans_.begin();  // what has waited was most often asked for before all the rest
  } else {
    while (behind != spans_.begin() && std::prev(behind)->operation->number > number) --behind;
  }
  spans_.insert(behind, std::move(span));
}

void BlockPump::turn() {
  if (spans_.empty()) return;
  fill();
  if (in_flight_ == 0) return;
  const unsigned min = config_.overlap_events ? 1 : in_flight_;
  const unsigned count = engine_->reap(min, completions_);
  in_flight_ -= count;
  most_attempts_ = 0;
  for (unsigned i = 0; i < count; ++i) {
    complete(static_cast<unsigned>(completions_[i].tag), completions_[i].res);
  }
  back_off(most_attempts_);
}

// Sends what is to be sent again first, then new blocks, until the queue is full.
void BlockPump::fill() {
  std::vector<unsigned> slots;
  slots.swap(resend_);
  for (auto span = spans_.begin(); span != spans_.end() && !free_.empty();) {
    const auto current = span++;
    if (current->operation->failed()) current->next = current->end;
    while (current->next < current->end && !free_.empty()) {
      const unsigned slot = free_.back();
      blocks_[slot] = Block{current, {}, false, 0};
      if (!prepare_next(blocks_[slot])) break;
      free_.pop_back();
      slots.push_back(slot);
    }
    drop_finished(current);
  }
  send(slots);
}

// Cuts the next block off the block's span. False when the operation failed on the way.
bool BlockPump::prepare_next(Block& block) {
  Span& span = *block.span;
  const TransferSpec& spec = span.operation->spec;
  IoFile& file = *span.operation->file;
  const std::uint64_t granule = file.granule();
  char* const data = static_cast<char*>(spec.data) + (span.next - spec.offset);
  const std::uint64_t aligned_end = span.end / granule * granule;
  std::uint64_t end;
  if (file.direct_allowed(data, span.next) && span.next < aligned_end) {
    end = std::min(span.next + std::max(config_.block_size / granule * granule, granule), aligned_end);
  } else {
    // A ragged start goes up to the next granule, so that what follows can go direct; see IoFile::direct_allowed.
    end = std::min(span.next + config_.block_size, span.end);
    const std::uint64_t boundary = (span.next / granule + 1) * granule;
    const bool then_direct = boundary < aligned_end && file.direct_allowed(data + (boundary - span.next), boundary);
    if (then_direct) end = std::min(end, boundary);
  }
  block.request = {.direction = spec.direction,
                   .data = data,
                   .length = static_cast<std::uint32_t>(end - span.next),
                   .offset = span.next,
                   .region = span.operation->region.get()};
  try {
    choose_descriptor(block);
  } catch (IoError& error) {
    span.operation->fail(std::move(error));
    span.next = span.end;
    return false;
  }
  span.next = end;
  ++span.blocks_open;
  return true;
}

void BlockPump::choose_descriptor(Block& block) const {
  IoFile& file = *block.span->operation->file;
  IoRequest& request = block.request;
  block.direct = file.direct_allowed(request.data, request.offset) && request.length % file.granule() == 0;
  request.fd = block.direct ? file.direct_fd() : file.buffered_fd();
  request.file_id = config_.registered ? file.id(block.direct) : 0;
}

void BlockPump::send(std::vector<unsigned>& slots) {
  batch_.clear();
  for (const unsigned slot : slots) {
    blocks_[slot].request.tag = slot;
    batch_.push_back(blocks_[slot].request);
  }
  const std::size_t step = config_.single_submit ? 1 : batch_.size();
  std::size_t sent = 0;
  while (sent < batch_.size()) {
    const std::span<const IoRequest> rest = std::span(batch_).subspan(sent);
    const unsigned taken = engine_->submit(rest.first(std::min(step, rest.size())));
    sent += taken;
    in_flight_ += taken;
    if (taken == 0) break;
    if (config_.single_submit) engine_->reap(0, {});  // starts it now
  }
  resend_.insert(resend_.end(), slots.begin() + static_cast<std::ptrdiff_t>(sent), slots.end());
}

void BlockPump::complete(unsigned slot, std::int64_t res) {
  Block& block = blocks_[slot];
  const bool reading = block.request.direction == Direction::kRead;
  if (res > 0) {
    advance(slot, static_cast<std::uint64_t>(res));
  } else if (res == 0 && reading) {
    give_up(slot, ENODATA, "the file ends before the read does: it was cut short while it was read");
  } else if (res == -EINVAL && block.direct) {
    block.span->operation->file->forbid_direct();  // through the page cache from here on
    retry(slot);
  } else if (res == 0 || res == -EAGAIN || res == -EINTR) {
    if (++block.attempts < kMaxAttempts) {
      most_attempts_ = std::max(most_attempts_, block.attempts);
      retry(slot);
    } else {
      give_up(slot, res == 0 ? EIO : static_cast<int>(-res), "the device takes no bytes, however often asked");
    }
  } else {
    give_up(slot, static_cast<int>(-res), std::strerror(static_cast<int>(-res)));
  }
}

void BlockPump::advance(unsigned slot, std::uint64_t moved) {
  Block& block = blocks_[slot];
  IoRequest& request = block.request;
  block.attempts = 0;
  moved = std::min<std::uint64_t>(moved, request.length);
  block.span->operation->bytes_moved += moved;
  if (moved == request.length) {
    finish_block(slot);
    return;
  }
  request.data = static_cast<char*>(request.data) + moved;
  request.offset += moved;
  request.length -= static_cast<std::uint32_t>(moved);
  // A rest that no longer starts on a granule goes through the page cache. That is safe within one block: nothing else
  // of its granule is in flight, and the kernel orders cached and direct I/O on the same bytes.
  retry(slot);
}

void BlockPump::retry(unsigned slot) {
  Block& block = blocks_[slot];
  try {
    choose_descriptor(block);
  } catch (IoError& error) {
    give_up(slot, error.error, error.what());
    return;
  }
  resend_.push_back(slot);
}

void BlockPump::give_up(unsigned slot, int error, const std::string& what) {
  const Block& block = blocks_[slot];
  Operation& operation = *block.span->operation;
  const bool reading = block.request.direction == Direction::kRead;
  operation.fail(IoError(error,
                         what + ": " + (reading ? "reading " : "writing ") + std::to_string(block.request.length) +
                             " bytes at offset " + std::to_string(block.request.offset),
                         operation.file->path()));
  block.span->next = block.span->end;
  finish_block(slot);
}

void BlockPump::finish_block(unsigned slot) {
  const auto span = blocks_[slot].span;
  free_.push_back(slot);
  --span->blocks_open;
  drop_finished(span);
}

void BlockPump::drop_finished(std::list<Span>::iterator span) {
  if (span->next < span->end || span->blocks_open > 0) return;
  const OperationPtr operation = std::move(span->operation);
  spans_.erase(span);
  span_ended_(operation);
}

}  // namespace offload_opt
