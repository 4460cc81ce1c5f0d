// The codecs' loops under the sanitizers: tests/unit/test_codecs.py says what they must give.
#include <bit>
#include <memory>
#include <vector>

#include "coding.h"
#include "support.h"

namespace offload_opt {

namespace {

// Memory of exactly this size, so that a byte too far is found.
template <typename T>
std::unique_ptr<T[]> exactly(std::size_t count) {
  return std::make_unique<T[]>(count);
}

void round_trip(Int8Kind kind, const float* values, std::size_t count, Rounding rounding) {
  const std::size_t blocks = (count + kInt8Block - 1) / kInt8Block;
  const auto codes = exactly<std::uint8_t>(count);
  const auto exponents = exactly<std::uint8_t>(blocks);
  const auto back = exactly<float>(count);
  const std::size_t negative = encode_int8(kind, values, codes.get(), exponents.get(), count, rounding);
  CHECK(kind == Int8Kind::kSigned ? negative == count : negative <= count);
  if (negative < count) {
    CHECK(values[negative] < 0);
    return;
  }
  decode_int8(kind, codes.get(), exponents.get(), back.get(), count);
  for (std::size_t i = 0; i < count; ++i) CHECK(exponents[i / kInt8Block] != kInt8NotFinite || back[i] != back[i]);
}

// All formats in one run, cut out of a longer one: the ties are those of the longer one.
void together(std::mt19937_64& random, std::size_t count, Rounding rounding) {
  const std::size_t blocks = (count + kInt8Block - 1) / kInt8Block;
  const auto values = exactly<float>(count), back = exactly<float>(count), master = exactly<float>(count);
  const auto half = exactly<std::uint16_t>(count), weight = exactly<std::uint16_t>(count);
  const auto remainder = exactly<std::uint16_t>(count);
  const auto codes = exactly<std::uint8_t>(count), exponents = exactly<std::uint8_t>(blocks);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(random() >> 40);
    master[i] = std::bit_cast<float>(random() % 3 == 0 ? 0x3F808000U : 0x3F801234U);
  }
  std::vector<Coding> codings{{Format::kBf16, count, values.get(), half.get(), nullptr, rounding.key},
                              {Format::kNonNegative8, count, values.get(), codes.get(), exponents.get(), rounding.key},
                              {Format::kMaster, count, master.get(), remainder.get(), weight.get()}};
  const Found found = encode(codings, rounding.first, 4);
  CHECK(found.coding == codings.size());

  std::vector<std::int32_t> longer{0, 4};  // those before and after it are not its own
  for (const std::int32_t tie : found.ties) longer.push_back(tie + 5);
  longer.push_back(static_cast<std::int32_t>(count) + 5);
  Coding& joined = codings.back();
  joined.ties = longer.data();
  joined.tie_count = longer.size();
  joined.position = 5;
  joined.values = back.get();
  decode(codings, 4);
  for (std::size_t i = 0; i < count; ++i) CHECK(back[i] == master[i]);
}

}  // namespace

void check_codecs(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (std::size_t count = 0; count < 1500; count += count < 300 ? 1 : 61) {
    const Rounding rounding{random(), random() >> 1};
    const auto values = exactly<float>(count), back = exactly<float>(count);
    const auto weight = exactly<std::uint16_t>(count), remainder = exactly<std::uint16_t>(count);
    for (std::size_t i = 0; i < count; ++i) {
      // Any bits; some runs without signs, some with nothing but ties.
      const auto bits = static_cast<std::uint32_t>(random() >> (count % 3 == 0 ? 33 : 32));
      values[i] = std::bit_cast<float>(count % 5 == 0 ? (bits & 0x3FFE0000) | 0x8000 : bits);
    }
    encode_bf16(values.get(), weight.get(), count, rounding);
    decode_bf16(weight.get(), back.get(), count);
    round_trip(Int8Kind::kSigned, values.get(), count, rounding);
    round_trip(Int8Kind::kNonNegative, values.get(), count, rounding);

    together(random, count, rounding);

    std::vector<std::int32_t> ties;
    split_master(values.get(), weight.get(), remainder.get(), count, 7, ties);
    CHECK(count % 5 != 0 || ties.size() == count);
    join_master(weight.get(), remainder.get(), count, back.get());
    for (const std::int32_t tie : ties) raise_tie(back[tie - 7]);
    for (std::size_t i = 0; i < count; ++i) {
      const bool is_nan = values[i] != values[i];
      CHECK(is_nan ? back[i] != back[i]
                   : std::bit_cast<std::uint32_t>(back[i]) == std::bit_cast<std::uint32_t>(values[i]));
    }
  }
}

}  // namespace offload_opt
