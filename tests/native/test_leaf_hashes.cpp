// The hashes of leaves under the sanitizers, against those of xxHash without vector instructions: other code than the
// core's.
#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <thread>

#include "leaf_hashes.h"
#include "support.h"

#define XXH_INLINE_ALL
#define XXH_NO_STREAM
#define XXH_VECTOR 0  // XXH_SCALAR
#include "third_party/xxhash.h"

namespace offload_opt {
namespace {

constexpr std::size_t kLeaf = LeafHashes::kBytes;

using Part = std::span<const std::byte>;

// Memory of just so many bytes, for the sanitizer to see what is read beyond.
struct Memory {
  explicit Memory(std::mt19937_64& random, std::size_t bytes) : size(bytes), data(new std::byte[bytes]) {
    for (std::size_t i = 0; i < size; ++i) data[i] = static_cast<std::byte>(random());
  }
  Part part(std::size_t begin, std::size_t end) const { return {data.get() + begin, end - begin}; }
  Part all() const { return part(0, size); }
  const std::size_t size;
  const std::unique_ptr<std::byte[]> data;
};

// Each leaf hashed by itself.
std::vector<std::uint64_t> one_by_one(Part memory) {
  std::vector<std::uint64_t> hashes;
  for (std::size_t begin = 0; begin < memory.size(); begin += kLeaf) {
    hashes.push_back(XXH3_64bits(memory.data() + begin, std::min(kLeaf, memory.size() - begin)));
  }
  return hashes;
}

std::size_t below(std::mt19937_64& random, std::size_t end) { return random() % end; }

Part random_part(std::mt19937_64& random, Part of) {
  const std::size_t begin = below(random, of.size() + 1);
  return of.subspan(begin, below(random, of.size() - begin + 1));
}

// Parts of which none has bytes of another, in any order: two threads must not hash the same leaf.
std::vector<Part> cut(std::mt19937_64& random, Part of) {
  std::vector<std::size_t> ends{0, of.size()};
  for (int i = 0; i < 12; ++i) ends.push_back(below(random, of.size() + 1));
  std::sort(ends.begin(), ends.end());
  std::vector<Part> parts;
  for (std::size_t i = 1; i < ends.size(); ++i) {
    if (below(random, 4) != 0) parts.push_back(of.subspan(ends[i - 1], ends[i] - ends[i - 1]));
  }
  std::shuffle(parts.begin(), parts.end(), random);
  return parts;
}

void no_parts(const Memory& memory) {
  const auto expected = one_by_one(memory.all());
  for (const unsigned threads : {1U, 2U, 7U, 64U}) {
    LeafHashes hashes(memory.data.get(), memory.size);
    CHECK(hashes.finish(threads) == expected);
    CHECK(hashes.finish(threads) == expected);
  }
}

// Parts of `around`: where `memory` is not all of it, some lie before it, behind it and over its ends.
void parts_in_any_order(std::mt19937_64& random, Part around, Part memory) {
  LeafHashes hashes(memory.data(), memory.size());
  std::vector<Part> parts;
  for (int i = 0; i < 20; ++i) {
    parts.push_back(random_part(random, around));
    if (i % 2 == 0) hashes.add(parts.back());
  }
  hashes.add(parts, 1);
  hashes.add(cut(random, around), 4);
  CHECK(hashes.finish(4) == one_by_one(memory));
}

// Parts that end within leaves: the threads on both sides have bytes of such a leaf, and neither has all of it. So it
// is in encode().
void neighbours_on_threads(const Memory& memory) {
  constexpr std::size_t kThreads = 4;
  LeafHashes hashes(memory.data.get(), memory.size);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back(
        [&, i] { hashes.add(memory.part(memory.size * i / kThreads, memory.size * (i + 1) / kThreads)); });
  }
  for (auto& thread : threads) thread.join();
  CHECK(hashes.finish(1) == one_by_one(memory.all()));
}

// Each thread has leaves of its own, and adds parts of them one by one and together.
void parts_on_threads(std::mt19937_64& random, const Memory& memory) {
  LeafHashes hashes(memory.data.get(), memory.size);
  std::vector<std::thread> threads;
  for (std::size_t begin = 0; begin < memory.size;) {
    const std::size_t leaves = 1 + below(random, memory.size / kLeaf / 3 + 1);
    const std::size_t end = std::min(begin + leaves * kLeaf, memory.size);
    threads.emplace_back([&hashes, own = memory.part(begin, end), seed = random()] {
      std::mt19937_64 own_random(seed);
      for (int i = 0; i < 5; ++i) hashes.add(random_part(own_random, own));
      hashes.add(cut(own_random, own), 4);
    });
    begin = end;
  }
  for (auto& thread : threads) thread.join();
  CHECK(hashes.finish(4) == one_by_one(memory.all()));
}

// What is in no part as a whole is looked at in the end only; what is, at once and never again. The last leaf, of a few
// bytes, is whole where a part goes `to_the_end`.
void looked_at_once(std::mt19937_64& random, bool to_the_end) {
  const Memory memory(random, 5 * kLeaf + 7), elsewhere(random, kLeaf);
  LeafHashes hashes(memory.data.get(), memory.size);
  const auto before = one_by_one(memory.all());
  hashes.add(memory.part(kLeaf - 1, 3 * kLeaf + 1));
  const std::size_t end = memory.size - (to_the_end ? 0 : 1);
  hashes.add({memory.part(4 * kLeaf, end), elsewhere.all(), memory.part(3 * kLeaf, 4 * kLeaf - 1)}, 4);
  hashes.add(elsewhere.all());
  for (std::size_t i = 0; i < memory.size; i += 7) memory.data[i] ^= std::byte{1};
  const auto after = one_by_one(memory.all());
  const auto& found = hashes.finish(1);
  CHECK(found.size() == 6);
  const std::array early = {false, true, true, false, true, to_the_end};
  for (std::size_t leaf = 0; leaf < found.size(); ++leaf) {
    CHECK(before[leaf] != after[leaf]);
    CHECK(found[leaf] == (early[leaf] ? before : after)[leaf]);
  }
}

}  // namespace

void check_leaf_hashes(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const std::size_t some = below(random, 64 * kLeaf);
  const std::size_t many = (std::size_t{3} << 20) + below(random, std::size_t{1} << 19) * 2 + 1;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kLeaf - 1, kLeaf, kLeaf + 1, some, many}) {
    const Memory memory(random, size);
    no_parts(memory);
    parts_in_any_order(random, memory.all(), memory.all());
    parts_in_any_order(random, memory.all(), random_part(random, memory.all()));
    neighbours_on_threads(memory);
    parts_on_threads(random, memory);
  }
  looked_at_once(random, false);
  looked_at_once(random, true);
}

}  // namespace offload_opt
