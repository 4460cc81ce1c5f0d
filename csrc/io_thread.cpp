#include "io_thread.h"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace offload_opt {
namespace {

// Threads that compute keep a core for a slice, some milliseconds, before another that was woken gets it: meanwhile the
// device has nothing to do. One that asked for shorter slices interrupts them (Linux 6.12; sched_setattr(2)). It gets
// no more time than others, and needs no privilege. Where it is refused, nothing is lost.
void ask_for_short_slices() {
#ifdef SYS_sched_setattr
  struct {
    std::uint32_t size, policy;
    std::uint64_t flags;
    std::int32_t nice;
    std::uint32_t priority;
    std::uint64_t runtime, deadline, period;  // in nanoseconds
  } attributes{};                             // struct sched_attr of <linux/sched/types.h>, in its first version
  constexpr std::uint64_t kSlice = 100'000;   // the least that there is
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  constexpr std::uint32_t kOther = 0;  // SCHED_OTHER; what has another policy has been given it on purpose
  if (attributes.policy != kOther) return;
  attributes.runtime = kSlice;
  ::syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

}  // namespace

void become_io_thread() {
  sigset_t all;
  sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
  ask_for_short_slices();
}

}  // namespace offload_opt
