// Loops over many elements, on the threads that torch's own loops run on.
#pragma once

#include <algorithm>
#include <cstddef>

namespace offload_opt {

// Elements for which a thread is worth its while, as torch has it; parts begin at multiples of kGranule.
inline constexpr std::size_t kGrain = std::size_t{1} << 15;
inline constexpr std::size_t kGranule = std::size_t{1} << 10;

// Calls `work(context, index, count)` on `count` threads at once, the caller's among them; returns when all have. There
// are `threads` at most, and the caller's alone where the process has no OpenMP runtime.
void on_threads(unsigned threads, void (*work)(void*, unsigned, unsigned), void* context);

// Calls `part(begin, end)`, which must not throw, for parts of 0..count on up to `threads` threads.
//
// Each thread gets one run of elements, the same for the same count, and as torch's loops hand them out: what it reads
// is what it wrote in the loop before. On processors whose cores do not all share a cache, to take parts by turns costs
// several times the loop.
template <typename Part>
void in_parallel(std::size_t count, unsigned threads, const Part& part) {
  struct Context {
    const std::size_t count;
    const Part& part;
  } context{count, part};
  const auto work = [](void* pointer, unsigned index, unsigned of) {
    const auto& [all, run] = *static_cast<const Context*>(pointer);
    const std::size_t length = ((all + of - 1) / of + kGranule - 1) / kGranule * kGranule;
    const std::size_t begin = std::min(index * length, all);
    const std::size_t end = std::min(begin + length, all);
    if (begin < end) run(begin, end);
  };
  on_threads(count > kGrain ? threads : 1, work, &context);
}

}  // namespace offload_opt
