#include "parallel.h"

#include <dlfcn.h>

namespace offload_opt {
namespace {

// An OpenMP runtime by what compilers make of "#pragma omp parallel": GCC's names, which LLVM's and Intel's have, too.
struct OpenMp {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*index)();
  int (*count)();

  // The one that torch has loaded. With another, or threads of our own, there would be two teams for the same cores:
  // after each of its loops torch's keeps spinning for a while.
  static OpenMp of_this_process() {
    OpenMp found{};
    find("GOMP_parallel", found.parallel);
    find("omp_get_thread_num", found.index);
    find("omp_get_num_threads", found.count);
    return found;
  }

  bool works() const { return parallel != nullptr && index != nullptr && count != nullptr; }

 private:
  template <typename Function>
  static void find(const char* name, Function& function) {
    function = reinterpret_cast<Function>(::dlsym(RTLD_DEFAULT, name));
  }
};

}  // namespace

void on_threads(unsigned threads, void (*work)(void*, unsigned, unsigned), void* context) {
  static const OpenMp openmp = OpenMp::of_this_process();
  if (threads <= 1 || !openmp.works()) return work(context, 0, 1);
  struct Call {
    void (*work)(void*, unsigned, unsigned);
    void* context;
  } call{work, context};
  const auto run = [](void* pointer) {
    const Call& mine = *static_cast<const Call*>(pointer);
    mine.work(mine.context, static_cast<unsigned>(openmp.index()), static_cast<unsigned>(openmp.count()));
  };
  openmp.parallel(run, &call, threads, 0);
}

}  // namespace offload_opt
