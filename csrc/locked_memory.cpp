#include "locked_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

namespace offload_opt {

LockedMemory::LockedMemory(std::size_t size) : size_(size) {
  data_ = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "mmap of " + std::to_string(size) + " bytes");
  }
  if (::mlock(data_, size) != 0) why_not_locked_ = std::strerror(errno);
}

LockedMemory::~LockedMemory() { ::munmap(data_, size_); }

}  // namespace offload_opt
