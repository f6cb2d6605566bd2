// How a kernel file holds several instruction sets: namespaces scalar, avx2 and avx512 with the
// same function names, MK_BY_ISA to choose among them. Attributes rather than compiler flags, so
// that no inline function of a library can be compiled with instructions the machine may lack.
#pragma once

#include "masked_kernels/isa.h"

#define MK_INLINE inline __attribute__((always_inline))
#define MK_INLINE_LAMBDA __attribute__((always_inline)) // after the parameters

#if defined(__x86_64__)
#define MK_X86 1
#include <immintrin.h>

// GCC before 13 warns about the deliberately undefined operands inside its own intrinsics.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define MK_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define MK_AVX512                                                                                  \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2,popcnt")))
#define MK_BY_ISA(isa, fn)                                                                         \
  ((isa) == Isa::avx512 ? avx512::fn : (isa) == Isa::avx2 ? avx2::fn : scalar::fn)
#else
#define MK_X86 0
#define MK_BY_ISA(isa, fn) (scalar::fn)
#endif
