#include "leaf_hashes.h"

#include <algorithm>
#include <functional>

#include "parallel.h"

#if defined(__x86_64__)
#define XXH_DISPATCH_SCALAR 1  // some emulators tell nothing of their processor
#define XXH_DISPATCH_AVX512 0  // gcc 12 warns of uninitialised values in its own intrinsics
#include <xxh_x86dispatch.c>   // a loop for AVX2, chosen when the library is loaded: 2.8 times as fast
#else
#define XXH_INLINE_ALL
#define XXH_NO_STREAM
#include <xxhash.h>
#endif

namespace offload_opt {
namespace {

std::uint64_t xxh3(const std::byte* data, std::size_t size) {
#if defined(__x86_64__)
  return XXH3_64bits_dispatch(data, size);
#else
  return XXH3_64bits(data, size);
#endif
}

}  // namespace

LeafHashes::LeafHashes(const void* data, std::size_t size)
    : data_(static_cast<const std::byte*>(data)),
      size_(size),
      hashes_((size + kBytes - 1) / kBytes),
      done_(hashes_.size()) {}

LeafHashes::Range LeafHashes::within(std::span<const std::byte> part) const {
  const std::less<> before;  // of addresses in different memory, too
  if (before(part.data(), data_) || before(data_ + size_, part.data() + part.size())) return {0, 0};
  const auto begin = static_cast<std::size_t>(part.data() - data_);
  const std::size_t end = begin + part.size();
  return {(begin + kBytes - 1) / kBytes, end == size_ ? hashes_.size() : end / kBytes};
}

void LeafHashes::hash(std::size_t leaf) {
  const std::size_t begin = leaf * kBytes;
  hashes_[leaf] = xxh3(data_ + begin, std::min(kBytes, size_ - begin));
  done_[leaf] = 1;
}

void LeafHashes::add(std::span<const std::byte> part) {
  const auto [first, last] = within(part);
  for (std::size_t leaf = first; leaf < last; ++leaf) hash(leaf);
}

void LeafHashes::add(const std::vector<std::span<const std::byte>>& parts, unsigned threads) {
  std::vector<std::size_t> leaves;
  for (const auto part : parts) {
    const auto [first, last] = within(part);
    for (std::size_t leaf = first; leaf < last; ++leaf) leaves.push_back(leaf);
  }
  std::sort(leaves.begin(), leaves.end());  // no leaf twice: two threads would write its hash
  leaves.erase(std::unique(leaves.begin(), leaves.end()), leaves.end());
  hash_all(leaves, threads);
}

const std::vector<std::uint64_t>& LeafHashes::finish(unsigned threads) {
  std::vector<std::size_t> leaves;
  for (std::size_t leaf = 0; leaf < done_.size(); ++leaf) {
    if (done_[leaf] == 0) leaves.push_back(leaf);
  }
  hash_all(leaves, threads);
  return hashes_;
}

void LeafHashes::hash_all(const std::vector<std::size_t>& leaves, unsigned threads) {
  constexpr std::size_t kElements = kBytes / sizeof(float);  // what in_parallel counts
  in_parallel(leaves.size() * kElements, threads, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = (begin + kElements - 1) / kElements; i * kElements < end; ++i) hash(leaves[i]);
  });
}

}  // namespace offload_opt
