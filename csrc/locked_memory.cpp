#include "locked_memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <system_error>

#include "io_file.h"

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

namespace offload_opt {
namespace {

// The regions of the process's LockedMemory, by address.
class Regions {
 public:
  static Regions& get() {
    static Regions* const regions = new Regions;  // never destroyed: memory may be freed at any point of the exit
    return *regions;
  }

  void add(const std::shared_ptr<MemoryRegion>& region) {
    std::lock_guard lock(mutex_);
    by_address_.insert_or_assign(address(region->data), region);
  }

  void remove(const std::shared_ptr<MemoryRegion>& region) {
    std::lock_guard lock(mutex_);
    by_address_.erase(address(region->data));
  }

  std::shared_ptr<const MemoryRegion> find(std::uintptr_t data, std::uint64_t length) {
    std::lock_guard lock(mutex_);
    auto next = by_address_.upper_bound(data);
    if (next == by_address_.begin()) return nullptr;
    const auto& [begin, region] = *--next;
    const std::uint64_t offset = data - begin;
    const bool inside = offset <= region->size && length <= region->size - offset;
    return inside && !region->foreign() ? region : nullptr;
  }

  static std::uintptr_t address(const void* data) { return reinterpret_cast<std::uintptr_t>(data); }

 private:
  Regions() {
    // A child of fork() makes memory of its own: it must not find the lock taken.
    ::pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::map<std::uintptr_t, std::shared_ptr<MemoryRegion>> by_address_;
};

constexpr std::size_t kHugePage = 2u << 20;

void* map(std::size_t size) {
  return ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

// Huge pages spare the device a scatter list of single pages, and the kernel the work of pinning them. Only whole ones
// inside the memory are used, so it takes no more of them than its size.
void* map_on_huge_pages(std::size_t size) {
  void* const reserved = map(size + kHugePage);
  if (reserved == MAP_FAILED) return reserved;
  char* const all = static_cast<char*>(reserved);
  const std::size_t before = (kHugePage - Regions::address(all) % kHugePage) % kHugePage;
  if (before > 0) ::munmap(all, before);
  ::munmap(all + before + size, kHugePage - before);
#ifdef MADV_HUGEPAGE
  ::madvise(all + before, size, MADV_HUGEPAGE);
#endif
  return all + before;
}

}  // namespace

LockedMemory::LockedMemory(std::size_t size) : size_((size + page_size() - 1) / page_size() * page_size()) {
  data_ = size_ < kHugePage ? map(size_) : map_on_huge_pages(size_);
  if (data_ == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "mmap of " + std::to_string(size) + " bytes");
  }
  if (::mlock(data_, size_) != 0) why_not_locked_ = std::strerror(errno);
  region_ = std::make_shared<MemoryRegion>(data_, size_);
  Regions::get().add(region_);
}

LockedMemory::~LockedMemory() {
  // In a child of fork() that the memory was left out of, something else may lie there.
  if (region_->foreign()) return;
  region_->end();
  Regions::get().remove(region_);
  ::munmap(data_, size_);
}

std::shared_ptr<const MemoryRegion> find_region(const void* data, std::uint64_t length) {
  return Regions::get().find(Regions::address(data), length);
}

}  // namespace offload_opt
