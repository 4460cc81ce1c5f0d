// Adam and AdamW on state that has codecs: decoded, updated and encoded tile by tile, in the nearest cache.
#pragma once

#include <cstdint>
#include <vector>

#include "coding.h"
#include "leaf_hashes.h"

namespace offload_opt {

// One step, by the usual names of its options; `step` counts from 1.
struct AdamStep {
  double lr, beta1, beta2, eps, weight_decay;
  bool is_decoupled;  // weight decay is AdamW's
  bool is_maximizing;
  double step = 0;
};

// A run of one parameter, all of one `count`. A kExact one is updated where its values are, for the others `values` is
// not looked at; of the gradient nothing is stored.
struct AdamRun {
  Coding parameter, gradient, exp_avg, exp_avg_sq;

  // The same where the state lies in a unit whose bytes begin at `data`: here, what is stored of it is given by its
  // distance from there. A parameter, the weights beside a master and its ties, and a gradient are no state.
  AdamRun in_unit(std::uintptr_t data) const;
};

// Each element is updated as ATen's fused kernel for CPUs does it in its vector code (FusedAdamKernel.cpp; bit for bit
// that of 2.13 with AVX2), also the last few, which its scalar code rounds otherwise: what comes out does not depend on
// how the parameter is cut. `first`, `threads` and `hashes` are as for encode(). Returns the ties of the parameter,
// where that is a master.
std::vector<std::int32_t> adam(const AdamRun& run, const AdamStep& step, std::uint64_t first, unsigned threads,
                               LeafHashes* hashes);

}  // namespace offload_opt
