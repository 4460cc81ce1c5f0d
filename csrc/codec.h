// The loops behind codecs.py: fp32 values <-> the bytes that are stored for them. Nothing is checked here.
//
// What is rounded is rounded up or down at random, so that the mean of what is stored is the value. The random numbers
// are counter-based: those of an element depend on the key and on the element's number alone, so a run gives the same
// bytes whatever it is part of. reference.py has the same in tensor operations: the two must agree bit for bit.
//
// coding.h runs them for several tensors at once, on all threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace offload_opt {

struct Rounding {
  std::uint64_t key = 0;
  std::uint64_t first = 0;  // the number of the run's first element
};

// bf16: sign, 8 bits of exponent, 7 of mantissa; the high half of an fp32. Inf and NaN stay what they are; a finite
// value stays finite.
void encode_bf16(const float* values, std::uint16_t* stored, std::size_t count, Rounding rounding);
void decode_bf16(const std::uint16_t* stored, float* values, std::size_t count);

// int8: a byte for each value and one for each block of kInt8Block values, counted from the run's start.
//
// The block's byte is a biased exponent of fp32, such that the block's largest value rounds to no more than the top
// code. A value's byte is a floating-point number relative to it, with gradual underflow: below 2^mantissa codes are
// evenly spaced, from there on each octave has 2^mantissa codes, as in G.711 and as in fp32 itself. Code 0 is zero.
//   kSigned       1 bit of sign, 3 of exponent, 4 of mantissa
//   kNonNegative  4 bits of exponent, 4 of mantissa; what is not zero gets at least code 1
// A block with an inf or NaN has the byte kInt8NotFinite, and is all NaN when it comes back.
//
// The split of the bits is a compromise, by what Adam's real moments lose (benchmarks/codecs.py). With one bit of
// mantissa less, errors nearly double. With one more, most get smaller, but the range gets short: many more of a
// block's small values become zero or, of the second moment, far too large.
enum class Int8Kind : std::uint8_t { kSigned, kNonNegative };
inline constexpr std::size_t kInt8Block = 128;
inline constexpr std::uint8_t kInt8NotFinite = 255;

// Stores `count` codes and ceil(count / kInt8Block) exponents. kNonNegative: returns the index of the first value below
// zero, and what is stored is of no use then; `count` where there is none.
std::size_t encode_int8(Int8Kind kind, const float* values, std::uint8_t* codes, std::uint8_t* exponents,
                        std::size_t count, Rounding rounding);
void decode_int8(Int8Kind kind, const std::uint8_t* codes, const std::uint8_t* exponents, float* values,
                 std::size_t count);

// An fp32 master as a bf16 weight, rounded to nearest even, and the low 16 bits, which round-to-nearest threw away.
// The weight was rounded up where the low bits are above one half. At exactly one half the weight does not tell, so the
// positions of those that were not rounded up are kept: ties. Adds them to `ties`, in order, counted from `position`
// on.
void split_master(const float* master, std::uint16_t* weight, std::uint16_t* remainder, std::size_t count,
                  std::size_t position, std::vector<std::int32_t>& ties);
// Without ties: each of them gets what is just below it in the high half, until raise_tie has been called for it.
void join_master(const std::uint16_t* weight, const std::uint16_t* remainder, std::size_t count, float* master);
void raise_tie(float& master);

}  // namespace offload_opt
