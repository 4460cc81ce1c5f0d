#include <unistd.h>

#include <utility>

#include "io_engine.h"

namespace offload_opt {

MemoryRegion::MemoryRegion(void* region_data, std::size_t region_size)
    : data(region_data), size(region_size), owner_(::getpid()) {}

bool MemoryRegion::foreign() const { return ::getpid() != owner_; }

void MemoryRegion::end() {
  if (foreign()) return;
  std::vector<std::weak_ptr<Registrar>> registrars;
  {
    std::lock_guard lock(mutex_);
    registrars.swap(registrars_);
  }
  for (const auto& registrar : registrars) {
    if (const auto alive = registrar.lock()) alive->forget(*this);
  }
}

void MemoryRegion::tell_at_end(std::weak_ptr<Registrar> registrar) const {
  std::lock_guard lock(mutex_);
  registrars_.push_back(std::move(registrar));
}

}  // namespace offload_opt
