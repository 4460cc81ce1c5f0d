// The hashes of a piece of memory, leaf by leaf: in any order, on several threads, and best while a cache has the
// bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace offload_opt {

// The hashes of `size` bytes at `data`: of each kBytes, and of the rest that is the last one, its 64 bits of XXH3.
class LeafHashes {
 public:
  static constexpr std::size_t kBytes = std::size_t{1} << 14;

  // Looks at nothing yet. The memory must outlive what is called here.
  LeafHashes(const void* data, std::size_t size);

  // Hashes the leaves that lie in the bytes of `part` as a whole, which must stay as they are. A part that is not
  // wholly in the memory is left out. Any thread, while no other has a part with the same leaf as a whole.
  void add(std::span<const std::byte> part);

  // The same of several parts, which may overlap, on up to `threads` threads.
  void add(const std::vector<std::span<const std::byte>>& parts, unsigned threads);

  // The hashes of all leaves, in order.
  const std::vector<std::uint64_t>& finish(unsigned threads);

 private:
  struct Range {
    std::size_t first, last;
  };
  Range within(std::span<const std::byte> part) const;
  void hash(std::size_t leaf);
  void hash_all(const std::vector<std::size_t>& leaves, unsigned threads);

  const std::byte* const data_;
  const std::size_t size_;
  std::vector<std::uint64_t> hashes_;
  std::vector<std::uint8_t> done_;  // by leaf; not bits: threads set their own ones
};

}  // namespace offload_opt
