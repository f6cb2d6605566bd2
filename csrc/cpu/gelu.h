// GELU(x) = x * cdf(x), cdf that of the standard normal distribution, and what its derivative is
// made of. All polynomials were fitted for the least largest error of the result.
#pragma once

#include "vector.h"

namespace masked_kernels {

// 1.5 * 2^23: a sum with it is rounded to an integer.
constexpr float kRound = 12582912.0f;

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

// The tail of the distribution is exp(-x²/2) times a smooth function of |x|, here a polynomial: no
// division, and where the polynomial is worst the exponential is smallest. The error is 2e-8 of the
// cdf, 2e-9 of the exponential.
template <int kLanes>
struct Normal {
  Floats<kLanes> cdf;
  Floats<kLanes> bell; // exp(-x²/2), the density times sqrt(2 pi)

  MK_INLINE explicit Normal(const Floats<kLanes>& x) {
    constexpr float kHalfLog2e = 0.72134752f;
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
    const Floats<kLanes> power = max_of<kLanes>(raw, splat<kLanes>(kLeast));
    const Floats<kLanes> rounded = power + kRound;
    const Floats<kLanes> mantissa = polynomial<kLanes>(kExp2, power - (rounded - kRound));
    Ints<kLanes> bits, exponent;
    std::memcpy(&bits, &mantissa, sizeof bits);
    std::memcpy(&exponent, &rounded, sizeof exponent);
    bits += exponent << 23;
    std::memcpy(&bell, &bits, sizeof bell);
    bell = raw > kLeast ? bell : Floats<kLanes>{};

    const Floats<kLanes> size = magnitude<kLanes>(x);
    const Floats<kLanes> near = min_of<kLanes>(size, splat<kLanes>(kTailEnd));
    const Floats<kLanes> tail = bell * polynomial<kLanes>(kTail, near);
    cdf = x > 0.0f ? 1.0f - tail : tail;
  }
};

// Each lane's entry of the table, by the two lowest bits of its index.
template <int kLanes>
MK_INLINE Floats<kLanes> looked_up(const float (&table)[4], const Floats<kLanes>& index) {
  Floats<kLanes> tables, entries;
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4)
    std::memcpy(reinterpret_cast<float*>(&tables) + i, table, sizeof table);
  // No intrinsic: the instruction set is that of the function which this is inlined into.
  asm("vpermilps %2, %1, %0" : "=v"(entries) : "v"(tables), "v"(index));
  return entries;
}

// Of each vector of x. With wide ones: max(x, 0) plus an even function, which is smooth on either
// side of 0. Four polynomials of |x|, chosen by a permutation of their coefficients, take half the
// time of the exponential. The error is 6e-9 before rounding, near 0 relative to GELU.
//
// A step of each vector before the next step: steps wait for one another, and fewer than two
// vectors fit into the queue of instructions that wait.
template <int kLanes, int kVectors>
MK_INLINE void gelu(Floats<kLanes> (&x)[kVectors]) {
  if constexpr (kLanes < 8) {
    for (Floats<kLanes>& each : x)
      each *= Normal<kLanes>(each).cdf;
  } else {
    // Coefficients in powers of the distance from the centers 0, 1, 2 and 3 of |x| * kScale.
    constexpr int kDegree = 9;
    constexpr float kScale = 3.5f / 5.75f;
    constexpr float kEnd = 5.7499995f; // where the last ends, and the function is 0
    constexpr float kTerms[kDegree + 1][4] = {
        {0.0f, -0.0824816748f, -0.00167118316f, -2.04123353e-06f},
        {-0.821428597f, 0.196794406f, 0.00891062431f, 1.64804969e-05f},
        {1.07673717f, -0.0976053104f, -0.0214313678f, -6.3757594e-05f},
        {1.66348877e-06f, -0.163446292f, 0.0297936685f, 0.00015665502f},
        {-0.484384924f, 0.238991573f, -0.024661053f, -0.000272717065f},
        {0.000399646931f, -0.074599199f, 0.0093570929f, 0.000354719872f},
        {0.193584085f, -0.0647434443f, 0.00376967271f, -0.000354254647f},
        {0.00939316675f, 0.0536751337f, -0.00710062729f, 0.000272378966f},
        {-0.0842308104f, 0.00394948479f, 0.00319379847f, -0.000149370215f},
        {0.027399471f, -0.014328423f, 0.000126643703f, 4.2701151e-05f},
    };
    Floats<kLanes> center[kVectors]; // the low bits hold the integer
    Floats<kLanes> from_center[kVectors], square[kVectors], sums[kVectors][2];
    for (int v = 0; v < kVectors; ++v) {
      const Floats<kLanes> near = min_of<kLanes>(magnitude<kLanes>(x[v]), splat<kLanes>(kEnd));
      center[v] = near * kScale + kRound;
      from_center[v] = near * kScale - (center[v] - kRound);
      square[v] = from_center[v] * from_center[v];
    }
#pragma GCC unroll 16
    for (int i = kDegree; i >= 0; --i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats<kLanes> term = looked_up<kLanes>(kTerms[i], center[v]);
        sums[v][i % 2] = i > kDegree - 2 ? term : sums[v][i % 2] * square[v] + term;
      }
    for (int v = 0; v < kVectors; ++v) { // NaN stays NaN
      const Floats<kLanes> positive = max_of<kLanes>(Floats<kLanes>{}, x[v]);
      x[v] = positive + (sums[v][1] * from_center[v] + sums[v][0]);
    }
  }
}

} // namespace masked_kernels
