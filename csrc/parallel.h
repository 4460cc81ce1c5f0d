// Loops over many elements, on the threads of the process's OpenMP runtime: those on which tensor operations run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

namespace offload_opt {

// As few elements as a thread is woken for, the same as in tensor operations; parts begin at multiples of kGranule.
inline constexpr std::size_t kGrain = std::size_t{1} << 15;
inline constexpr std::size_t kGranule = std::size_t{1} << 10;
// As many turns each thread gets of in_turns, where they do not become too long.
inline constexpr std::size_t kTurns = 8;

// Calls `work(context, index, count)` on as many threads as OpenMP takes, the caller's among them; returns when all
// have. On the caller's alone where `is_parallel` is false, or the process has no OpenMP runtime.
void on_threads(bool is_parallel, void (*work)(void*, unsigned, unsigned), void* context);

// How many threads in_parallel uses for very many elements.
unsigned thread_count(unsigned threads);

// Calls `part(begin, end)`, which must not throw, for parts of 0..count on up to `threads` threads.
//
// Each thread gets one run of elements, the same for the same count, and as tensor operations hand them out: what it
// reads is what it wrote in the loop before. On processors whose cores do not all share a cache, to take parts by turns
// costs several times the loop.
template <typename Part>
void in_parallel(std::size_t count, unsigned threads, const Part& part) {
  struct Context {
    const std::size_t count;
    const Part& part;
    const std::size_t most_parts;
  } context{count, part, std::min<std::size_t>(threads, (count + kGrain - 1) / kGrain)};
  const auto work = [](void* pointer, unsigned index, unsigned team) {
    const auto& [all, run, most] = *static_cast<const Context*>(pointer);
    const std::size_t of = std::max<std::size_t>(std::min<std::size_t>(team, most), 1);
    const std::size_t length = ((all + of - 1) / of + kGranule - 1) / kGranule * kGranule;
    const std::size_t begin = std::min(index * length, all);
    const std::size_t end = std::min(begin + length, all);
    if (begin < end) run(begin, end);
  };
  on_threads(context.most_parts > 1, work, &context);
}

// The same in parts that the threads take by turns, each of whole `unit`s and at most `longest` elements: where nothing
// of a part is in a thread's cache yet, and others want the cores, too. The threads are through at nearly the same time
// then.
template <typename Part>
void in_turns(std::size_t count, std::size_t unit, std::size_t longest, unsigned threads, const Part& part) {
  const std::size_t most_threads = std::clamp<std::size_t>((count + kGrain - 1) / kGrain, 1, std::max(threads, 1U));
  const std::size_t even = (count / (kTurns * most_threads) / unit + 1) * unit;
  struct Context {
    const std::size_t count, length, most_threads;
    const Part& part;
    std::atomic<std::size_t> taken{0};
  } context{count, std::min(even, longest), most_threads, part};
  const auto work = [](void* pointer, unsigned index, unsigned) {
    auto& [all, length, most, run, taken] = *static_cast<Context*>(pointer);
    if (index >= most) return;
    for (std::size_t begin = taken.fetch_add(length); begin < all; begin = taken.fetch_add(length)) {
      run(begin, std::min(begin + length, all));
    }
  };
  on_threads(most_threads > 1, work, &context);
}

}  // namespace offload_opt
