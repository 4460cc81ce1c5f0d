// Page-aligned memory that is locked into RAM where the system allows it. No framework's allocator is involved, so the
// size is exact to the page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "io_engine.h"

namespace offload_opt {

class LockedMemory {
 public:
  // Maps and locks `size` > 0 bytes, rounded up to whole pages and zeroed, in huge pages as far as they fit into it and
  // the system has them. Throws std::system_error when there is no memory. Failing to lock is no error.
  explicit LockedMemory(std::size_t size);
  ~LockedMemory();
  LockedMemory(const LockedMemory&) = delete;
  LockedMemory& operator=(const LockedMemory&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Empty when the memory is locked, else the reason why not.
  const std::string& why_not_locked() const { return why_not_locked_; }

 private:
  void* data_;
  std::size_t size_;
  std::string why_not_locked_;
  std::shared_ptr<MemoryRegion> region_;
};

// The region of the LockedMemory that all of [data, data + length) lies in, or null. Any thread.
std::shared_ptr<const MemoryRegion> find_region(const void* data, std::uint64_t length);

}  // namespace offload_opt
