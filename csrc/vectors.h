// Loops compiled for several sets of vector instructions, of which the machine's best is taken when they run.
#pragma once

#include <cstdint>

namespace offload_opt {

#define OFFLOAD_OPT_INLINE __attribute__((always_inline))

// Runs `loop`, which must be OFFLOAD_OPT_INLINE, compiled for the vector instructions that this machine has. Done by
// hand: target_clones needs ifuncs, which musl and the sanitizers do not get on with.
#if defined(__x86_64__)
template <typename Loop>
__attribute__((target("avx2,fma"))) void with_avx2(Loop loop) {
  loop();
}
template <typename Loop>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))) void with_avx512(Loop loop) {
  loop();
}

enum class Vectors : std::uint8_t { kPlain, kAvx2, kAvx512 };

inline Vectors supported_vectors() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Vectors::kAvx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Vectors::kAvx2 : Vectors::kPlain;
}

template <typename Loop>
void vectorised(Loop loop) {
  static const Vectors vectors = supported_vectors();
  switch (vectors) {
    case Vectors::kAvx512:
      return with_avx512(loop);
    case Vectors::kAvx2:
      return with_avx2(loop);
    case Vectors::kPlain:
      return loop();
  }
}
#else
template <typename Loop>
void vectorised(Loop loop) {
  loop();
}
#endif

}  // namespace offload_opt
