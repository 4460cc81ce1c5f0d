// Page-aligned memory that is locked into RAM where the system allows it. No framework's allocator is involved, so the
// size is exact to the page.
#pragma once

#include <cstddef>
#include <string>

namespace offload_opt {

class LockedMemory {
 public:
  // Maps and locks `size` > 0 bytes, zeroed. Throws std::system_error when there is no memory. Failing to lock is no
  // error.
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
};

}  // namespace offload_opt
