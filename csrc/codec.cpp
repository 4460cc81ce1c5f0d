// Compiled so that these loops become vector instructions (CMakeLists.txt): each is written without branches and calls.
#include "codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace offload_opt {

namespace {

constexpr std::uint32_t kMagnitude = 0x7FFFFFFF;
constexpr std::uint32_t kInf = 0x7F800000;
constexpr std::uint32_t kQuiet = 0x00400000;

OFFLOAD_OPT_INLINE inline std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
OFFLOAD_OPT_INLINE inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

// Both must be vector operations everywhere: std::min and std::max go through references.
OFFLOAD_OPT_INLINE inline std::uint32_t lesser(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }
OFFLOAD_OPT_INLINE inline std::uint32_t greater(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// Elements that share the numbers from which their random bits are made, counted from the parameter's first.
constexpr std::size_t kStretch = 1024;
static_assert(kStretch >= kInt8Block && kStretch <= 1024);  // a block is of two at most; see random_bits()

// The random bits of a stretch, from one of its elements on: `start`, and for each element `step` more, modulo 2^32.
struct Stretch {
  std::uint32_t step;
  std::uint32_t start;
};

// Both numbers are of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), whose
// state the key is and which makes one output a stretch.
OFFLOAD_OPT_INLINE inline Stretch stretch_at(Rounding rounding, std::uint64_t offset) {
  const std::uint64_t element = rounding.first + offset;
  std::uint64_t x = rounding.key + (element / kStretch + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  x ^= x >> 31;
  const auto step = static_cast<std::uint32_t>(x >> 32);
  return {step, static_cast<std::uint32_t>(x) + step * static_cast<std::uint32_t>(element % kStretch)};
}

// How many elements from the one at `offset` on are of its stretch.
OFFLOAD_OPT_INLINE inline std::size_t stretch_length(Rounding rounding, std::uint64_t offset) {
  return kStretch - (rounding.first + offset) % kStretch;
}

// Random bits of the i-th element, of which the upper 23 may be used: over all keys each of their values is as likely
// as any other, and those of any two elements of a stretch are independent, though not of three (Dietzfelbinger:
// Universal hashing and k-wise independent random variables via integer arithmetic without primes, 1996; 10 bits of i
// leave 23). So each value is rounded without bias, and sums of errors have the variance of independent ones, for one
// addition an element.
OFFLOAD_OPT_INLINE inline std::uint32_t random_bits(Stretch stretch, std::uint32_t i) {
  return stretch.start + i * stretch.step;
}

OFFLOAD_OPT_INLINE inline std::uint16_t bf16_at_random(std::uint32_t bits, std::uint32_t random) {
  const std::uint32_t magnitude = bits & kMagnitude;
  const std::uint32_t rounded = lesser(magnitude + (random >> 16), kInf - 1);
  const std::uint32_t special = magnitude > kInf ? magnitude | kQuiet : magnitude;
  const std::uint32_t result = magnitude >= kInf ? special : rounded;
  return static_cast<std::uint16_t>((result | (bits & ~kMagnitude)) >> 16);
}

// The numbers that a byte of int8 stands for, relative to its block's exponent.
template <bool has_sign, std::uint32_t mantissa>
struct Minifloat {
  static constexpr bool kSigned = has_sign;
  static constexpr std::uint32_t kShift = 23 - mantissa;    // bits of fp32's mantissa that are rounded away
  static constexpr std::uint32_t kLinear = 1U << mantissa;  // codes below it are evenly spaced
  static constexpr std::uint32_t kTop = has_sign ? 127 : 255;
  // From `base`, the exponent of code kLinear, to the block's exponent, that of code kTop.
  static constexpr std::uint32_t kOctaves = (kTop + 1) / kLinear - 2;
  // The least block exponent: code 1 is then the least normal number of fp32, so that no result is denormal.
  static constexpr std::uint32_t kLeast = kOctaves + mantissa + 1;

  // Of a block whose largest magnitude has these bits, after it has been rounded up.
  static std::uint32_t block_exponent(std::uint32_t largest) {
    return std::clamp((largest + (1U << kShift) - 1) >> 23, kLeast, 254U);
  }

  // The bits of `base`.
  static std::uint32_t base(std::uint32_t block_exponent) {
    return (std::max(block_exponent, kLeast) - kOctaves) << 23;
  }

  // Adding `base` to a smaller value moves its mantissa to where evenly spaced codes have it, and the bits go on from
  // there without a seam: so adding random bits and cutting off rounds without bias from zero to the top. Of a value
  // x, that is x + base below base, and above it x with an exponent one higher; the greater one is right. Back, of a
  // place p, it is the lesser one of p - base and p with an exponent one lower. (No sum's rounding changes which.)
  OFFLOAD_OPT_INLINE static std::uint8_t encode(std::uint32_t bits, std::uint32_t base, std::uint32_t random) {
    const std::uint32_t magnitude = bits & kMagnitude;
    const std::uint32_t even = bits_of(float_of(magnitude) + float_of(base));
    const std::uint32_t place = greater(even, magnitude + (1U << 23)) - base;
    std::uint32_t code = lesser((place + (random >> (32 - kShift))) >> kShift, kTop);
    if constexpr (kSigned) {
      code |= (bits & ~kMagnitude) >> 24;
    } else {
      code = greater(code, lesser(magnitude, 1));  // that of zero is zero already
    }
    return static_cast<std::uint8_t>(code);
  }

  // Whether encode_usual() does for a block whose magnitudes have bits from `least` to `largest`.
  static bool is_usual(std::uint32_t least, std::uint32_t largest) {
    return largest + (1U << kShift) <= 255U << 23 && (kSigned || least > 0);
  }

  // encode() in fewer steps: no code is above kTop, as no block exponent had to be lowered, and of non-negative values
  // none is zero. What is a multiple of 256 codes does not show in a byte, nor what a sum carries away from the sign.
  OFFLOAD_OPT_INLINE static std::uint8_t encode_usual(std::uint32_t bits, std::uint32_t base, std::uint32_t random) {
    const std::uint32_t magnitude = kSigned ? bits & kMagnitude : bits;
    const std::uint32_t even = bits_of(float_of(magnitude) + float_of(base));
    std::uint32_t place = greater(even, magnitude + (1U << 23)) + (random >> (32 - kShift));
    if constexpr (kSigned) place += (bits & ~kMagnitude) >> (24 - kShift);
    const auto code = static_cast<std::uint8_t>((place >> kShift) - (base >> kShift));
    return kSigned || code > 0 ? code : 1;
  }

  OFFLOAD_OPT_INLINE static float decode(std::uint8_t code, std::uint32_t base) {
    // Its sign in all upper bits, in place already.
    const std::uint32_t extended = kSigned ? static_cast<std::uint32_t>(static_cast<std::int8_t>(code)) : code;
    const std::uint32_t place = base + (extended << kShift & kTop << kShift);
    const std::uint32_t even = bits_of(float_of(place) - float_of(base));  // exact, and normal or zero
    const std::uint32_t result = lesser(even, place - (1U << 23));
    return float_of(kSigned ? result | (extended & ~kMagnitude) : result);
  }
};

using SignedFormat = Minifloat<true, 4>;
using NonNegativeFormat = Minifloat<false, 4>;

OFFLOAD_OPT_INLINE inline std::uint32_t largest_magnitude(const float* values, std::size_t count) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = greater(largest, bits_of(values[i]) & kMagnitude);
  return largest;
}

struct Extremes {
  std::uint32_t least, largest;
};

// Of the bits of a whole block: of none below zero, those of the magnitudes.
OFFLOAD_OPT_INLINE inline Extremes extreme_bits(const float* values) {
  std::uint32_t least = ~0U;
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < kInt8Block; ++i) {
    least = lesser(least, bits_of(values[i]));
    largest = greater(largest, bits_of(values[i]));
  }
  return {least, largest};
}

// The index of the first value below zero, of a whole block; kInt8Block where there is none. A NaN is not below zero.
std::size_t first_negative(const float* values) {
  const auto is_negative = [](float value) {
    return bits_of(value) > ~kMagnitude && bits_of(value) <= (~kMagnitude | kInf);
  };
  return static_cast<std::size_t>(std::find_if(values, values + kInt8Block, is_negative) - values);
}

// The random bits of a block's elements: `start`, and for each the step from there.
struct BlockBits {
  std::uint32_t start = 0;
  std::uint32_t steps[kInt8Block];
  std::size_t stretch_end = 0;  // for blocks that end before it, the steps stay as they are

  // To the block that begins at `offset` in the run; from there on only.
  OFFLOAD_OPT_INLINE void move_to(Rounding rounding, std::size_t offset) {
    const Stretch stretch = stretch_at(rounding, offset);
    start = stretch.start;
    if (offset + kInt8Block <= stretch_end) return;
    const std::size_t length = stretch_length(rounding, offset);
    stretch_end = offset + length;
    for (std::uint32_t i = 0; i < kInt8Block; ++i) steps[i] = i * stretch.step;
    if (length >= kInt8Block) return;  // nearly always
    const Stretch next = stretch_at(rounding, stretch_end);
    for (std::size_t i = length; i < kInt8Block; ++i) {
      steps[i] = random_bits(next, static_cast<std::uint32_t>(i - length)) - start;
    }
  }
};

enum class Encoding : std::uint8_t { kUsual, kAny, kNotFinite };

// What a whole block is encoded by.
struct Scan {
  std::uint32_t base;
  std::uint8_t exponent;
  Encoding encoding;
  std::size_t negative;  // as first_negative() says
};

template <typename Format>
OFFLOAD_OPT_INLINE inline Scan scan_block(const float* values) {
  auto [least, largest] = Format::kSigned ? Extremes{0, largest_magnitude(values, kInt8Block)} : extreme_bits(values);
  std::size_t negative = kInt8Block;
  if (!Format::kSigned && largest > kMagnitude) {
    negative = first_negative(values);
    least = 0;  // with the sign of -0.0, or of a NaN
    largest = largest_magnitude(values, kInt8Block);
  }
  if (largest >= kInf) return {0, kInt8NotFinite, Encoding::kNotFinite, negative};
  const std::uint32_t exponent = Format::block_exponent(largest);
  const Encoding encoding = Format::is_usual(least, largest) ? Encoding::kUsual : Encoding::kAny;
  return {Format::base(exponent), static_cast<std::uint8_t>(exponent), encoding, negative};
}

template <typename Format>
OFFLOAD_OPT_INLINE inline void encode_block(const float* __restrict__ values, std::uint8_t* __restrict__ codes,
                                            const Scan& scan, const BlockBits& random) {
  const std::uint32_t base = scan.base;
  const std::uint32_t start = random.start;
  switch (scan.encoding) {
    case Encoding::kUsual:
      for (std::size_t i = 0; i < kInt8Block; ++i) {
        codes[i] = Format::encode_usual(bits_of(values[i]), base, start + random.steps[i]);
      }
      return;
    case Encoding::kAny:
      for (std::size_t i = 0; i < kInt8Block; ++i) {
        codes[i] = Format::encode(bits_of(values[i]), base, start + random.steps[i]);
      }
      return;
    case Encoding::kNotFinite:
      std::memset(codes, 0, kInt8Block);
  }
}

// Whole blocks, of which `exponents` has the first one's, from the one at `offset` in the run on. Returns the index of
// the first value below zero, or `count`.
template <typename Format>
OFFLOAD_OPT_INLINE inline std::size_t encode_whole(const float* values, std::uint8_t* codes, std::uint8_t* exponents,
                                                   std::size_t count, Rounding rounding, std::size_t offset) {
  constexpr std::size_t kGroup = 8;  // blocks that are looked at before: else each would wait for its largest value
  BlockBits random;
  for (std::size_t start = 0; start < count; start += kGroup * kInt8Block) {
    Scan scans[kGroup];
    const std::size_t blocks = std::min(kGroup, (count - start) / kInt8Block);
    for (std::size_t i = 0; i < blocks; ++i) scans[i] = scan_block<Format>(values + start + i * kInt8Block);
    for (std::size_t i = 0; i < blocks; ++i) {
      const std::size_t begin = start + i * kInt8Block;
      if (scans[i].negative != kInt8Block) return begin + scans[i].negative;
      exponents[begin / kInt8Block] = scans[i].exponent;
      random.move_to(rounding, offset + begin);
      encode_block<Format>(values + begin, codes + begin, scans[i], random);
    }
  }
  return count;
}

template <typename Format>
std::size_t encode_blocks(const float* values, std::uint8_t* codes, std::uint8_t* exponents, std::size_t count,
                          Rounding rounding) {
  std::size_t negative = count;
  vectorised([&]() OFFLOAD_OPT_INLINE {
    const std::size_t whole = count / kInt8Block * kInt8Block;
    const std::size_t found = encode_whole<Format>(values, codes, exponents, whole, rounding, 0);
    if (found != whole) negative = found;
    if (found != whole || whole == count) return;
    float rest[kInt8Block] = {};
    std::uint8_t rest_codes[kInt8Block];
    std::memcpy(rest, values + whole, (count - whole) * sizeof(float));
    const std::size_t in_rest =
        encode_whole<Format>(rest, rest_codes, exponents + whole / kInt8Block, kInt8Block, rounding, whole);
    if (in_rest != kInt8Block) negative = whole + in_rest;
    std::memcpy(codes + whole, rest_codes, count - whole);
  });
  return negative;
}

template <typename Format>
OFFLOAD_OPT_INLINE inline void decode_block(const std::uint8_t* __restrict__ codes, std::uint8_t exponent,
                                            float* __restrict__ values, std::size_t count) {
  if (exponent == kInt8NotFinite) {
    std::fill_n(values, count, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const std::uint32_t base = Format::base(exponent);
  for (std::size_t i = 0; i < count; ++i) values[i] = Format::decode(codes[i], base);
}

template <typename Format>
void decode_blocks(const std::uint8_t* codes, const std::uint8_t* exponents, float* values, std::size_t count) {
  vectorised([=]() OFFLOAD_OPT_INLINE {
    const std::size_t whole = count / kInt8Block * kInt8Block;
    for (std::size_t start = 0; start < whole; start += kInt8Block) {
      decode_block<Format>(codes + start, exponents[start / kInt8Block], values + start, kInt8Block);
    }
    if (whole < count)
      decode_block<Format>(codes + whole, exponents[whole / kInt8Block], values + whole, count - whole);
  });
}

constexpr std::uint32_t kLowHalf = 0xFFFF;
constexpr std::uint32_t kHalf = 0x8000;
constexpr std::size_t kTieBlock = 1024;  // elements; one in 2^17 is a tie, so few blocks have any

// To nearest even, as the hardware does it. Of no NaN.
OFFLOAD_OPT_INLINE inline std::uint16_t number_to_bf16(std::uint32_t bits) {
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// The same; any NaN becomes the one NaN 0x7FC0.
OFFLOAD_OPT_INLINE inline std::uint16_t to_bf16(std::uint32_t bits) {
  return (bits & kMagnitude) > kInf ? 0x7FC0 : number_to_bf16(bits);
}

// One half, above an even number: rounded down, unlike all else with these low bits.
OFFLOAD_OPT_INLINE inline bool is_tie(std::uint32_t bits) { return (bits & (kLowHalf | 0x10000)) == kHalf; }

// Returns whether there are ties.
OFFLOAD_OPT_INLINE inline bool split_block(const float* __restrict__ master, std::uint16_t* __restrict__ weight,
                                           std::uint16_t* __restrict__ remainder, std::size_t count) {
  std::uint32_t ties = 0;
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = bits_of(master[i]);
    weight[i] = number_to_bf16(bits);
    remainder[i] = static_cast<std::uint16_t>(bits);
    ties |= is_tie(bits) ? ~0U : 0U;
    largest = greater(largest, bits & kMagnitude);
  }
  if (largest > kInf) {
    for (std::size_t i = 0; i < count; ++i) weight[i] = to_bf16(bits_of(master[i]));
  }
  return ties != 0;
}

// Of one stretch. With room above the largest of them, the bits that are added reach neither inf nor the sign.
OFFLOAD_OPT_INLINE inline void encode_bf16_stretch(const float* __restrict__ values, std::uint16_t* __restrict__ stored,
                                                   std::size_t count, Stretch stretch) {
  if (largest_magnitude(values, count) < kInf - 0x10000) {
    std::uint32_t random = stretch.start;  // summed up: compilers multiply for each otherwise
    for (std::size_t i = 0; i < count; ++i, random += stretch.step) {
      stored[i] = static_cast<std::uint16_t>((bits_of(values[i]) + (random >> 16)) >> 16);
    }
  } else {
    for (std::size_t i = 0; i < count; ++i) {
      stored[i] = bf16_at_random(bits_of(values[i]), random_bits(stretch, static_cast<std::uint32_t>(i)));
    }
  }
}

}  // namespace

void encode_bf16(const float* values, std::uint16_t* stored, std::size_t count, Rounding rounding) {
  vectorised([=]() OFFLOAD_OPT_INLINE {
    for (std::size_t offset = 0, length = 0; offset < count; offset += length) {
      length = std::min(count - offset, stretch_length(rounding, offset));
      encode_bf16_stretch(values + offset, stored + offset, length, stretch_at(rounding, offset));
    }
  });
}

void decode_bf16(const std::uint16_t* __restrict__ stored, float* __restrict__ values, std::size_t count) {
  vectorised([=]() OFFLOAD_OPT_INLINE {
    for (std::size_t i = 0; i < count; ++i) values[i] = float_of(std::uint32_t{stored[i]} << 16);
  });
}

std::size_t encode_int8(Int8Kind kind, const float* values, std::uint8_t* codes, std::uint8_t* exponents,
                        std::size_t count, Rounding rounding) {
  const auto encode = kind == Int8Kind::kSigned ? encode_blocks<SignedFormat> : encode_blocks<NonNegativeFormat>;
  return encode(values, codes, exponents, count, rounding);
}

void decode_int8(Int8Kind kind, const std::uint8_t* codes, const std::uint8_t* exponents, float* values,
                 std::size_t count) {
  const auto decode = kind == Int8Kind::kSigned ? decode_blocks<SignedFormat> : decode_blocks<NonNegativeFormat>;
  decode(codes, exponents, values, count);
}

void split_master(const float* master, std::uint16_t* weight, std::uint16_t* remainder, std::size_t count,
                  std::size_t position, std::vector<std::int32_t>& ties) {
  vectorised([=, &ties]() OFFLOAD_OPT_INLINE {
    for (std::size_t start = 0; start < count; start += kTieBlock) {
      const std::size_t end = std::min(start + kTieBlock, count);
      if (!split_block(master + start, weight + start, remainder + start, end - start)) continue;
      for (std::size_t i = start; i < end; ++i) {
        if (is_tie(bits_of(master[i]))) ties.push_back(static_cast<std::int32_t>(position + i));
      }
    }
  });
}

void join_master(const std::uint16_t* __restrict__ weight, const std::uint16_t* __restrict__ remainder,
                 std::size_t count, float* __restrict__ master) {
  vectorised([=]() OFFLOAD_OPT_INLINE {
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t low = remainder[i];
      // The high half is the weight, or one less where it was rounded up: the borrow of this subtraction.
      master[i] = float_of((std::uint32_t{weight[i]} << 16) + low - ((low & kHalf) << 1));
    }
  });
}

void raise_tie(float& master) { master = float_of(bits_of(master) + 0x10000); }

}  // namespace offload_opt
