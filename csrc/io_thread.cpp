#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "io_engine.h"

namespace offload_opt {
namespace {

// Threads that compute keep a core for a slice, some milliseconds, before another that was woken gets it: meanwhile the
// device has nothing to do. One that asked for shorter slices interrupts them (Linux 6.12; sched_setattr(2)). It gets
// no more time than others, and needs no privilege. Where it is refused, nothing is lost.
void ask_for_short_slices() {
#ifdef SYS_sched_setattr
  // struct sched_attr of <linux/sched/types.h>, in its first version; times are in nanoseconds.
  struct {
    std::uint32_t size, policy;
    std::uint64_t flags;
    std::int32_t nice;
    std::uint32_t priority;
    std::uint64_t runtime, deadline, period;
  } attributes{};
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  if (attributes.policy != SCHED_OTHER) return;  // somebody gave it another on purpose
  attributes.runtime = 100'000;                  // the least that there is
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
