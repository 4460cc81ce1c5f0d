// A forwarding engine that injects faults by a seeded plan. Faults live here and nowhere in the real engines.
#pragma once

#include <cstdint>
#include <memory>

#include "io_engine.h"

namespace offload_opt {

// Each field is the chance in 0..1 that a request meets that fault. The same seed and requests give the same faults.
struct FaultPlan {
  std::uint64_t seed = 0;
  double short_transfer = 0;  // only a part of the request is done
  double interrupted = 0;     // -EINTR, nothing done
  double again = 0;           // -EAGAIN, nothing done
  double io_error = 0;        // -EIO, nothing done
  double no_space = 0;        // -ENOSPC for writes, nothing done
  double full = 0;            // not taken, as if the queue were full; never while nothing is in flight
  double late = 0;            // taken, but started only by the next reap()
  double delayed = 0;         // the completion is held back for some reaps, or for up to 300 microseconds
  double shuffled = 0;        // for each reap(): the completions come in random order
};

std::unique_ptr<IoEngine> make_fault_engine(std::unique_ptr<IoEngine> inner, const FaultPlan& plan);

}  // namespace offload_opt
