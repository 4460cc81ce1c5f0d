// The hashes of leaves under the sanitizers: tests/unit/test_checksums.py says what they must be.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <thread>

#include "leaf_hashes.h"
#include "support.h"

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
  const std::size_t size;
  const std::unique_ptr<std::byte[]> data;
};

// Each leaf hashed by itself.
std::vector<std::uint64_t> one_by_one(const Memory& memory) {
  std::vector<std::uint64_t> hashes;
  for (std::size_t begin = 0; begin < memory.size; begin += kLeaf) {
    LeafHashes leaf(memory.data.get() + begin, std::min(kLeaf, memory.size - begin));
    hashes.push_back(leaf.finish(1).at(0));
  }
  return hashes;
}

void parts_in_any_order(std::mt19937_64& random, const Memory& memory) {
  LeafHashes hashes(memory.data.get(), memory.size);
  std::vector<Part> parts;
  for (int i = 0; i < 20; ++i) {
    const std::size_t begin = random() % (memory.size + 1);
    parts.push_back(memory.part(begin, begin + random() % (memory.size - begin + 1)));
    if (i % 2 == 0) hashes.add(parts.back());
  }
  hashes.add(parts, 4);
  CHECK(hashes.finish(4) == one_by_one(memory));
}

void parts_on_threads(const Memory& memory) {
  constexpr std::size_t kThreads = 4;
  LeafHashes hashes(memory.data.get(), memory.size);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back(
        [&, i] { hashes.add(memory.part(memory.size * i / kThreads, memory.size * (i + 1) / kThreads)); });
  }
  for (auto& thread : threads) thread.join();
  CHECK(hashes.finish(1) == one_by_one(memory));
}

// What is in no part as a whole is looked at in the end only; what is, at once and never again.
void looked_at_once(std::mt19937_64& random) {
  const Memory memory(random, 5 * kLeaf + 7), elsewhere(random, kLeaf);
  LeafHashes hashes(memory.data.get(), memory.size);
  const auto before = one_by_one(memory);
  hashes.add(memory.part(kLeaf - 1, 3 * kLeaf + 1));
  hashes.add(memory.part(4 * kLeaf, memory.size - 1));
  hashes.add(elsewhere.part(0, kLeaf));
  for (std::size_t i = 0; i < memory.size; i += 7) memory.data[i] ^= std::byte{1};
  const auto after = one_by_one(memory);
  const auto& found = hashes.finish(1);
  CHECK(found.size() == 6);
  const std::array early = {false, true, true, false, true, false};
  for (std::size_t leaf = 0; leaf < found.size(); ++leaf) {
    CHECK(before[leaf] != after[leaf]);
    CHECK(found[leaf] == (early[leaf] ? before : after)[leaf]);
  }
}

}  // namespace

void check_leaf_hashes(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kLeaf - 1, kLeaf, kLeaf + 1, 40 * kLeaf + 12'345}) {
    const Memory memory(random, size);
    parts_in_any_order(random, memory);
    parts_on_threads(memory);
  }
  looked_at_once(random);
}

}  // namespace offload_opt
