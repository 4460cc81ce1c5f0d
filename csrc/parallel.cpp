#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>

namespace offload_opt {
namespace {

// An OpenMP runtime by what compilers make of "#pragma omp parallel": GCC's names, which LLVM's and Intel's have, too.
struct OpenMp {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*index)();
  int (*count)();

  // The one that tensor operations use. With another, or threads of our own, there would be two teams for the same
  // cores: after each loop a team keeps spinning for a while. All of it comes from one library: there may be several.
  static OpenMp of_this_process() {
    OpenMp found{};
    Dl_info library{};
    void* const parallel = ::dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (parallel == nullptr || ::dladdr(parallel, &library) == 0) return found;
    void* const handle = ::dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (handle == nullptr) return found;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(parallel);
    found.index = reinterpret_cast<decltype(found.index)>(::dlsym(handle, "omp_get_thread_num"));
    found.count = reinterpret_cast<decltype(found.count)>(::dlsym(handle, "omp_get_num_threads"));
    return found;
  }

  bool works() const { return parallel != nullptr && index != nullptr && count != nullptr; }
};

}  // namespace

void on_threads(bool is_parallel, void (*work)(void*, unsigned, unsigned), void* context) {
  static const OpenMp openmp = OpenMp::of_this_process();
  if (!is_parallel || !openmp.works()) return work(context, 0, 1);
  struct Call {
    void (*work)(void*, unsigned, unsigned);
    void* context;
  } call{work, context};
  const auto run = [](void* pointer) {
    const Call& mine = *static_cast<const Call*>(pointer);
    mine.work(mine.context, static_cast<unsigned>(openmp.index()), static_cast<unsigned>(openmp.count()));
  };
  openmp.parallel(run, &call, 0, 0);  // 0: the usual team; a smaller one would end the threads that it lacks
}

unsigned thread_count(unsigned threads) {
  unsigned team = 1;
  const auto count = [](void* pointer, unsigned index, unsigned of) {
    if (index == 0) *static_cast<unsigned*>(pointer) = of;
  };
  on_threads(threads > 1, count, &team);
  return std::min(team, threads);
}

}  // namespace offload_opt
