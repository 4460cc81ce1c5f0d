#include "coding.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <utility>

#include "parallel.h"

namespace offload_opt {
namespace {

static_assert(kGranule % kInt8Block == 0);  // a thread's part begins with a block

template <typename T>
T* from(void* memory, std::size_t element) {
  return static_cast<T*>(memory) + element;
}

Int8Kind kind_of(Format format) { return format == Format::kSigned8 ? Int8Kind::kSigned : Int8Kind::kNonNegative; }

}  // namespace

void decode_part(const Coding& coding, std::size_t begin, std::size_t end, float* values) {
  switch (coding.format) {
    case Format::kBf16:
      return decode_bf16(from<std::uint16_t>(coding.stored, begin), values, end - begin);
    case Format::kSigned8:
    case Format::kNonNegative8:
      return decode_int8(kind_of(coding.format), from<std::uint8_t>(coding.stored, begin),
                         from<std::uint8_t>(coding.beside, begin / kInt8Block), values, end - begin);
    case Format::kMaster: {
      join_master(from<std::uint16_t>(coding.beside, begin), from<std::uint16_t>(coding.stored, begin), end - begin,
                  values);
      const auto first = static_cast<std::int64_t>(coding.position + begin);
      const auto count = static_cast<std::int64_t>(end - begin);
      const std::int32_t* const last = coding.ties + coding.tie_count;
      for (auto tie = std::lower_bound(coding.ties, last, first); tie < last && *tie - first < count; ++tie) {
        if (*tie >= first) raise_tie(values[*tie - first]);  // so it is, if they are in order
      }
      return;
    }
    case Format::kExact:
      return;
  }
}

std::size_t encode_part(const Coding& coding, std::size_t begin, std::size_t end, std::uint64_t first,
                        const float* values, std::vector<std::int32_t>& ties) {
  const Rounding rounding{coding.key, first + begin};
  switch (coding.format) {
    case Format::kBf16:
      encode_bf16(values, from<std::uint16_t>(coding.stored, begin), end - begin, rounding);
      break;
    case Format::kSigned8:
    case Format::kNonNegative8:
      return encode_int8(kind_of(coding.format), values, from<std::uint8_t>(coding.stored, begin),
                         from<std::uint8_t>(coding.beside, begin / kInt8Block), end - begin, rounding);
    case Format::kMaster:
      split_master(values, from<std::uint16_t>(coding.beside, begin), from<std::uint16_t>(coding.stored, begin),
                   end - begin, coding.position + begin, ties);
      break;
    case Format::kExact:
      break;
  }
  return end - begin;
}

std::span<const std::byte> stored_part(const Coding& coding, std::size_t begin, std::size_t end) {
  const bool is_8_bits = coding.format == Format::kSigned8 || coding.format == Format::kNonNegative8;
  const std::size_t size = is_8_bits ? 1 : 2;
  return {from<const std::byte>(coding.stored, begin * size), (end - begin) * size};
}

void insert_ties(std::vector<std::int32_t>& all, const std::vector<std::int32_t>& ties) {
  if (ties.empty()) return;
  all.insert(std::lower_bound(all.begin(), all.end(), ties.front()), ties.begin(), ties.end());
}

namespace {

// Calls `part(i, begin, end)` on up to `threads` threads for parts of all codings.
template <typename Part>
void in_parts(const std::vector<Coding>& codings, unsigned threads, const Part& part) {
  for (std::size_t first = 0, last = 0; first < codings.size(); first = last) {
    const std::size_t count = codings[first].count;
    while (last < codings.size() && codings[last].count == count) ++last;
    in_parallel(count, threads, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = first; i < last; ++i) part(i, begin, end);
    });
  }
}

}  // namespace

void decode(const std::vector<Coding>& codings, unsigned threads) {
  in_parts(codings, threads, [&](std::size_t i, std::size_t begin, std::size_t end) {
    decode_part(codings[i], begin, end, codings[i].values + begin);
  });
}

Found encode(const std::vector<Coding>& codings, std::uint64_t first, unsigned threads, LeafHashes* hashes) {
  std::mutex mutex;
  std::exception_ptr error;
  Found found{codings.size(), 0, {}};
  const auto part = [&](std::size_t i, std::size_t begin, std::size_t end) {
    std::vector<std::int32_t> ties;
    const std::size_t negative = encode_part(codings[i], begin, end, first, codings[i].values + begin, ties);
    if (hashes != nullptr) hashes->add(stored_part(codings[i], begin, end));
    if (negative == end - begin && ties.empty()) return;
    const std::lock_guard lock(mutex);
    if (negative < end - begin && std::pair(i, begin + negative) < std::pair(found.coding, found.negative)) {
      found.coding = i;
      found.negative = begin + negative;
    }
    insert_ties(found.ties, ties);
  };
  in_parts(codings, threads, [&](std::size_t i, std::size_t begin, std::size_t end) {
    try {
      part(i, begin, end);
    } catch (...) {  // no memory for ties
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
  return found;
}

}  // namespace offload_opt
