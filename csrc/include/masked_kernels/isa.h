#pragma once

#include <string>

namespace masked_kernels {

enum class Isa { scalar, avx2, avx512 };

const char* name(Isa isa);

// The widest instruction set of this machine that the kernels know. avx512 stands for F, BW, VL and
// DQ; avx2 includes FMA, BMI2 and POPCNT.
Isa best_isa();

// `forced` names an instruction set ("scalar", "avx2", "avx512"); null or empty means the best.
// Throws std::invalid_argument when the name is unknown or this machine lacks the instructions.
Isa resolve_isa(const char* forced);

// What kernels should use now: resolve_isa of the environment's MASKED_KERNELS_CPU_ISA.
Isa active_isa();

} // namespace masked_kernels
