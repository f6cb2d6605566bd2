#include "masked_kernels/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace masked_kernels {

const char* name(Isa isa) {
  switch (isa) {
  case Isa::avx512:
    return "avx512";
  case Isa::avx2:
    return "avx2";
  default:
    return "scalar";
  }
}

Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return Isa::scalar;
#endif
}

Isa resolve_isa(const char* forced) {
  const Isa best = best_isa();
  if (forced == nullptr || *forced == '\0')
    return best;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (std::string(forced) != name(isa))
      continue;
    if (isa > best)
      throw std::invalid_argument(std::string("MASKED_KERNELS_CPU_ISA: this machine has no ") +
                                  forced + "; the best it has is " + name(best));
    return isa;
  }
  throw std::invalid_argument(std::string("MASKED_KERNELS_CPU_ISA: got \"") + forced +
                              "\", expected scalar, avx2 or avx512");
}

Isa active_isa() {
  return resolve_isa(std::getenv("MASKED_KERNELS_CPU_ISA"));
}

} // namespace masked_kernels
