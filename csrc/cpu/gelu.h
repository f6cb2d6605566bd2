// GELU(x) = x * cdf(x) of the standard normal distribution, and its derivative.
//
// The tail of the distribution is exp(-x²/2) times a smooth function of |x|, here a polynomial: no
// division, and where the polynomial is worst the exponential is smallest. Both were fitted for the
// least largest error of the result: 2e-8 of the cdf, 2e-9 of the exponential.
#pragma once

#include "vector.h"

namespace masked_kernels {

// Even and odd powers apart: half as many sums that wait for one another.
template <int kLanes, int kTerms>
MK_INLINE Floats<kLanes> polynomial(const float (&terms)[kTerms], const Floats<kLanes>& x) {
  const Floats<kLanes> square = x * x;
  Floats<kLanes> sums[2] = {
      splat<kLanes>(terms[(kTerms - 1) / 2 * 2]), splat<kLanes>(terms[kTerms / 2 * 2 - 1])};
#pragma GCC unroll 16
  for (int i = kTerms - 3; i >= 0; --i)
    sums[i % 2] = sums[i % 2] * square + terms[i];
  return sums[1] * x + sums[0];
}

template <int kLanes>
MK_INLINE Floats<kLanes> magnitude(const Floats<kLanes>& x) {
  Ints<kLanes> bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffff;
  Floats<kLanes> size;
  std::memcpy(&size, &bits, sizeof size);
  return size;
}

template <int kLanes>
struct Normal {
  Floats<kLanes> cdf;
  Floats<kLanes> bell; // exp(-x²/2), the density times sqrt(2 pi)

  MK_INLINE explicit Normal(const Floats<kLanes>& x) {
    constexpr float kHalfLog2e = 0.72134752f;
    constexpr float kRound = 12582912.0f; // 1.5 * 2^23: a sum with it is rounded to an integer
    // Below 2^-64 the exponential counts as 0. Times a small gradient it would be subnormal, and
    // whatever reads subnormal numbers, matrix products above all, slows down many times over.
    constexpr float kLeast = -64.0f;
    constexpr float kExp2[] = {1.0f, 0.693147206f, 0.240226469f, 0.0555032876f, 0.00961848896f,
        0.00133999379f, 0.000153458283f};
    constexpr float kTailEnd = 5.8f;
    constexpr float kTail[] = {0.499999979f, -0.398940237f, 0.249967344f, -0.132777129f,
        0.061845037f, -0.0253477962f, 0.00888490008f, -0.00251837729f, 0.000536456944f,
        -7.84973246e-05f, 6.90715115e-06f, -2.72165053e-07f};

    const Floats<kLanes> raw = x * x * -kHalfLog2e;
    const Floats<kLanes> power = raw > kLeast ? raw : splat<kLanes>(kLeast);
    const Floats<kLanes> rounded = power + kRound;
    const Floats<kLanes> mantissa = polynomial<kLanes>(kExp2, power - (rounded - kRound));
    Ints<kLanes> bits, exponent;
    std::memcpy(&bits, &mantissa, sizeof bits);
    std::memcpy(&exponent, &rounded, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&bell, &bits, sizeof bell);
    bell = raw > kLeast ? bell : Floats<kLanes>{};

    const Floats<kLanes> size = magnitude<kLanes>(x);
    const Floats<kLanes> near = size < kTailEnd ? size : splat<kLanes>(kTailEnd);
    const Floats<kLanes> tail = bell * polynomial<kLanes>(kTail, near);
    cdf = x > 0.0f ? 1.0f - tail : tail;
  }
};

} // namespace masked_kernels
