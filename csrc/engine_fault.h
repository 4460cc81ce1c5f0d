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
};

std::unique_ptr<IoEngine> make_fault_engine(std::unique_ptr<IoEngine> inner, const FaultPlan& plan);

}  // namespace offload_opt
