// Several tensors of one run of elements, decoded or encoded together: one loop over the elements on all threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "codec.h"
#include "leaf_hashes.h"

namespace offload_opt {

enum class Format : std::uint8_t { kBf16, kSigned8, kNonNegative8, kMaster, kExact };

// One of the tensors. Its fp32 `values`, `count` of them, and what is stored for them, by `format` (see codec.h):
//   kBf16          stored: bf16
//   kSigned8       stored: codes, beside: exponents
//   kNonNegative8  the same
//   kMaster        stored: remainders, beside: weights; with the `ties` of a longer run, ascending, in which this one
//                  begins at `position`
//   kExact         nothing: the values are what is stored. For adam.h only.
// `key`: for the rounding of what is rounded at random.
struct Coding {
  Format format;
  std::size_t count;
  float* values;
  void* stored;
  void* beside;
  std::uint64_t key = 0;
  const std::int32_t* ties = nullptr;
  std::size_t tie_count = 0;
  std::size_t position = 0;
};

// What has been found on the way: the coding with a value below zero where there must be none, the first of them, and
// the index of the first one in there; `codings.size()` where there is none. And the ties of the one master, in order,
// counted as its `position` is.
struct Found {
  std::size_t coding;
  std::size_t negative;
  std::vector<std::int32_t> ties;
};

// Neighbours of one length share a loop, on up to `threads` threads, see parallel.h: what is stored does not depend on
// how many. `first` is the number of the run's first element in its parameter. What is stored in the memory of
// `hashes`, which may be null, is hashed as soon as it is there, as far as it is whole leaves of a thread's part.
void decode(const std::vector<Coding>& codings, unsigned threads);
Found encode(const std::vector<Coding>& codings, std::uint64_t first, unsigned threads, LeafHashes* hashes = nullptr);

// The same of elements `begin` to `end` of one coding that is not kExact, on this thread, with `values` in place of the
// coding's. encode_part adds to `ties`, and returns the index in the part of the first value that is below zero where
// it must not be; `end - begin` if none is.
void decode_part(const Coding& coding, std::size_t begin, std::size_t end, float* values);
std::size_t encode_part(const Coding& coding, std::size_t begin, std::size_t end, std::uint64_t first,
                        const float* values, std::vector<std::int32_t>& ties);

// What encode_part() has stored for them, but for a master's weights and the exponents of 8 bits.
std::span<const std::byte> stored_part(const Coding& coding, std::size_t begin, std::size_t end);

// Adds the ties of a part to those of others, which are in order.
void insert_ties(std::vector<std::int32_t>& all, const std::vector<std::int32_t>& ties);

}  // namespace offload_opt
