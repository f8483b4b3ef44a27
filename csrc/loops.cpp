#include "loops.h"

namespace distill {

std::vector<const Loops*> available_loops() {
  std::vector<const Loops*> found;
#ifdef DISTILL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Loops);
  }
  // GCC 10 does not know f16c by name; every processor with AVX2 has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2Loops);
#endif
  found.push_back(&kPortableLoops);
  return found;
}

}  // namespace distill
