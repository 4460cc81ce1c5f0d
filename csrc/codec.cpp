// Compiled so that these loops become vector instructions (CMakeLists.txt): each is written without branches and calls.
#include "codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

namespace offload_opt {

namespace {

#define OFFLOAD_OPT_INLINE __attribute__((always_inline))

// Runs `loop`, which must be OFFLOAD_OPT_INLINE, compiled for the vector instructions that this machine has. Done by
// hand: target_clones needs ifuncs, which musl and the sanitizers do not get on with.
#if defined(__x86_64__)
template <typename Loop>
__attribute__((target("avx2"))) void with_avx2(Loop loop) {
  loop();
}
template <typename Loop>
__attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq"))) void with_avx512(Loop loop) {
  loop();
}

enum class Vectors : std::uint8_t { kPlain, kAvx2, kAvx512 };

Vectors supported_vectors() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Vectors::kAvx512;
  }
  return __builtin_cpu_supports("avx2") ? Vectors::kAvx2 : Vectors::kPlain;
}

template <typename Loop>
void vectorised(Loop loop) {
  static const Vectors vectors = supported_vectors();
  switch (vectors) {
    case Vectors::kAvx512:
      return with_avx512(loop);
    case Vectors::kAvx2:
      return with_avx2(loop);
    case Vectors::kPlain:
      return loop();
  }
}
#else
template <typename Loop>
void vectorised(Loop loop) {
  loop();
}
#endif

constexpr std::uint32_t kMagnitude = 0x7FFFFFFF;
constexpr std::uint32_t kInf = 0x7F800000;
constexpr std::uint32_t kQuiet = 0x00400000;

OFFLOAD_OPT_INLINE inline std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
OFFLOAD_OPT_INLINE inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

// Both must be vector operations everywhere: std::min and std::max go through references.
OFFLOAD_OPT_INLINE inline std::uint32_t lesser(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }
OFFLOAD_OPT_INLINE inline std::uint32_t greater(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// Where the random numbers of a stretch of elements start. `low` is the low half of the first one's number, plus half
// of the key; all of a stretch share the high half of the number, which the key has been mixed with.
struct Stretch {
  std::uint32_t low;
  std::uint32_t mixed;
};

// The mixing is splitmix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
OFFLOAD_OPT_INLINE inline Stretch stretch_at(Rounding rounding, std::uint64_t offset) {
  const std::uint64_t element = rounding.first + offset;
  std::uint64_t x = rounding.key + ((element >> 32) + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  x ^= x >> 31;
  return {static_cast<std::uint32_t>(element) + static_cast<std::uint32_t>(x), static_cast<std::uint32_t>(x >> 32)};
}

// How many elements from the one at `offset` on share the high half of their number.
OFFLOAD_OPT_INLINE inline std::size_t stretch_length(Rounding rounding, std::uint64_t offset) {
  return (std::uint64_t{1} << 32) - ((rounding.first + offset) & 0xFFFFFFFF);
}

// Random bits of a stretch's element i, the upper 16 to 20 of which are to be used: lowbias32 (Chris Wellons,
// https://nullprogram.com/blog/2018/07/31/) without its last round, which is for the lower ones, and with the other
// half of the key put in midway, so that one key's numbers are not another's in another order.
OFFLOAD_OPT_INLINE inline std::uint32_t random_bits(Stretch stretch, std::uint32_t i) {
  std::uint32_t x = stretch.low + i;
  x ^= x >> 16;
  x *= 0x7FEB352D;
  x ^= x >> 15;
  x ^= stretch.mixed;
  return x * 0x846CA68B;
}

// Calls `work(offset, length, stretch)` for each stretch of 0..count.
template <typename Work>
OFFLOAD_OPT_INLINE inline void for_each_stretch(Rounding rounding, std::size_t count, Work work) {
  for (std::size_t offset = 0; offset < count;) {
    const std::size_t length = std::min(count - offset, stretch_length(rounding, offset));
    work(offset, length, stretch_at(rounding, offset));
    offset += length;
  }
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

  OFFLOAD_OPT_INLINE static float decode(std::uint32_t code, std::uint32_t base) {
    const std::uint32_t magnitude = code & kTop;
    const std::uint32_t place = base + (magnitude << kShift);
    const std::uint32_t even = bits_of(float_of(place) - float_of(base));  // exact, and normal or zero
    const std::uint32_t result = lesser(even, place - (1U << 23));
    return float_of(kSigned ? result | (code & 0x80) << 24 : result);
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

// A whole block, whose elements start at `offset` in the run. Returns what first_negative() does.
template <typename Format>
OFFLOAD_OPT_INLINE inline std::size_t encode_block(const float* __restrict__ values, std::uint8_t* __restrict__ codes,
                                                   std::uint8_t* exponent, std::size_t offset, Rounding rounding) {
  auto [least, largest] = Format::kSigned ? Extremes{0, largest_magnitude(values, kInt8Block)} : extreme_bits(values);
  if (!Format::kSigned && largest > kMagnitude) {
    const std::size_t negative = first_negative(values);
    if (negative != kInt8Block) return negative;
    least = 0;  // with the sign of -0.0, or of a NaN
    largest = largest_magnitude(values, kInt8Block);
  }
  if (largest >= kInf) {
    *exponent = kInt8NotFinite;
    std::memset(codes, 0, kInt8Block);
    return kInt8Block;
  }
  const std::uint32_t block_exponent = Format::block_exponent(largest);
  *exponent = static_cast<std::uint8_t>(block_exponent);
  const std::uint32_t base = Format::base(block_exponent);
  if (stretch_length(rounding, offset) >= kInt8Block) {  // nearly always
    const Stretch stretch = stretch_at(rounding, offset);
    if (Format::is_usual(least, largest)) {
      for (std::uint32_t i = 0; i < kInt8Block; ++i) {
        codes[i] = Format::encode_usual(bits_of(values[i]), base, random_bits(stretch, i));
      }
    } else {
      for (std::uint32_t i = 0; i < kInt8Block; ++i) {
        codes[i] = Format::encode(bits_of(values[i]), base, random_bits(stretch, i));
      }
    }
  } else {
    for (std::size_t i = 0; i < kInt8Block; ++i) {
      codes[i] = Format::encode(bits_of(values[i]), base, random_bits(stretch_at(rounding, offset + i), 0));
    }
  }
  return kInt8Block;
}

template <typename Format>
std::size_t encode_blocks(const float* values, std::uint8_t* codes, std::uint8_t* exponents, std::size_t count,
                          Rounding rounding) {
  std::size_t negative = count;
  vectorised([&]() OFFLOAD_OPT_INLINE {
    const std::size_t whole = count / kInt8Block * kInt8Block;
    for (std::size_t start = 0; start < whole; start += kInt8Block) {
      const std::size_t found =
          encode_block<Format>(values + start, codes + start, exponents + start / kInt8Block, start, rounding);
      if (found != kInt8Block) {
        negative = start + found;
        return;
      }
    }
    if (whole == count) return;
    float rest[kInt8Block] = {};
    std::uint8_t rest_codes[kInt8Block];
    std::memcpy(rest, values + whole, (count - whole) * sizeof(float));
    const std::size_t found = encode_block<Format>(rest, rest_codes, exponents + whole / kInt8Block, whole, rounding);
    if (found != kInt8Block) negative = whole + found;
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
constexpr std::size_t kBf16Block = 1024;  // elements, whose largest one decides on the loop
constexpr std::size_t kTieBlock = 1024;   // elements; one in 2^17 is a tie, so few blocks have any

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

// Up to kBf16Block elements. With room above the largest of them, the bits that are added reach neither inf nor the
// sign.
OFFLOAD_OPT_INLINE inline void encode_bf16_block(const float* __restrict__ values, std::uint16_t* __restrict__ stored,
                                                 std::uint32_t count, Stretch stretch) {
  if (largest_magnitude(values, count) < kInf - 0x10000) {
    for (std::uint32_t i = 0; i < count; ++i) {
      stored[i] = static_cast<std::uint16_t>((bits_of(values[i]) + (random_bits(stretch, i) >> 16)) >> 16);
    }
  } else {
    for (std::uint32_t i = 0; i < count; ++i) {
      stored[i] = bf16_at_random(bits_of(values[i]), random_bits(stretch, i));
    }
  }
}

}  // namespace

void encode_bf16(const float* values, std::uint16_t* stored, std::size_t count, Rounding rounding) {
  vectorised([=]() OFFLOAD_OPT_INLINE {
    for_each_stretch(rounding, count, [=](std::size_t offset, std::size_t length, Stretch stretch) OFFLOAD_OPT_INLINE {
      for (std::size_t start = offset; start < offset + length; start += kBf16Block) {
        const auto block = static_cast<std::uint32_t>(std::min(kBf16Block, offset + length - start));
        encode_bf16_block(values + start, stored + start, block, stretch);
        stretch.low += block;
      }
    });
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
