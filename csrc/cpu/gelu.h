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

// max(x, 0) plus an even function is GELU(x), and that function is smooth on either side of 0. Here
// it is, as polynomials of |x|: one for each integer, its center, that |x| * scale is rounded to.
// The last ends where the function is 0. The error is 1.2e-8 before rounding, near 0 relative to
// GELU.
struct EvenPart {
  static constexpr float kEnd = 5.7499995f;

  // As many polynomials as floats that a permutation chooses among.
  template <int kPieces>
  struct Terms;
};

template <>
struct EvenPart::Terms<4> {
  static constexpr int kDegree = 9;
  static constexpr float kScale = 3.5f / 5.75f;
  alignas(16) static constexpr float kOf[kDegree + 1][4] = {
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
};

template <>
struct EvenPart::Terms<16> {
  static constexpr int kDegree = 5;
  static constexpr float kScale = 15.5f / 5.75f;
  alignas(64) static constexpr float kOf[kDegree + 1][16] = {
      {0.0f, -0.131816253f, -0.169950128f, -0.147877023f, -0.102270737f, -0.0590017363f,
          -0.0289656948f, -0.0122183086f, -0.0044515538f, -0.00140507042f, -0.00038492278f,
          -9.16328354e-05f, -1.89701241e-05f, -3.4171369e-06f, -5.35784238e-07f, -7.3142381e-08f},
      {-0.185483873f, -0.0805656388f, -0.00159165333f, 0.0393732525f, 0.047464069f, 0.037343964f,
          0.0228379555f, 0.0114494003f, 0.00481572421f, 0.00172012066f, 0.000525490323f,
          0.000137925235f, 3.11976219e-05f, 6.09444669e-06f, 1.02983608e-06f, 1.50709539e-07f},
      {0.0549011119f, 0.0477236174f, 0.0302169304f, 0.0112529602f, -0.00184243196f, -0.00707879616f,
          -0.00681098923f, -0.00447062263f, -0.00228576642f, -0.000953451206f, -0.000331656542f,
          -9.73914648e-05f, -2.43273553e-05f, -5.19530704e-06f, -9.51957702e-07f, -1.50054134e-07f},
      {2.49261325e-06f, -0.00454000197f, -0.0065970188f, -0.00561578246f, -0.00301209022f,
          -0.000630845781f, 0.000605456065f, 0.000830231991f, 0.000592391705f, 0.000307575043f,
          0.000126275758f, 4.24387908e-05f, 1.1889656e-05f, 2.8071413e-06f, 5.62518835e-07f,
          9.61469553e-08f},
      {-0.00127323146f, -0.000892286247f, -0.000109705979f, 0.000524906325f, 0.000682367303f,
          0.000463902688f, 0.000163855235f, -2.27590281e-05f, -7.58596725e-05f, -5.99293307e-05f,
          -3.15290636e-05f, -1.26903806e-05f, -4.10810071e-06f, -1.09613609e-06f, -2.445137e-07f,
          -4.60152236e-08f},
      {3.21793123e-05f, 0.000132122761f, 0.000159823641f, 8.24818126e-05f, -1.51198483e-05f,
          -6.14040036e-05f, -5.19602036e-05f, -2.24199066e-05f, -1.29164744e-06f, 5.72458475e-06f,
          4.97047267e-06f, 2.59939338e-06f, 1.00798241e-06f, 3.09403106e-07f, 7.74928139e-08f,
          1.61088938e-08f},
  };
};

// Each lane's entry of the table, by the lowest bits of its index. No intrinsics: the instruction
// set is that of the function which this is inlined into.
template <int kLanes>
MK_INLINE Floats<kLanes> looked_up(const float (&table)[4], const Floats<kLanes>& index) {
  Floats<kLanes> tables, entries;
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4)
    std::memcpy(reinterpret_cast<float*>(&tables) + i, table, sizeof table);
  asm("vpermilps %2, %1, %0" : "=v"(entries) : "v"(tables), "v"(index));
  return entries;
}

template <int kLanes>
MK_INLINE Floats<kLanes> looked_up(const float (&table)[16], const Floats<kLanes>& index) {
  Floats<kLanes> entries;
  asm("vpermps %2, %1, %0" : "=v"(entries) : "v"(index), "v"(load<kLanes>(table)));
  return entries;
}

// Of each vector of x; with wide ones by polynomials, half the time of the exponential or less.
//
// A step of each vector before the next step: steps wait for one another, and fewer than two
// vectors fit into the queue of instructions that wait.
template <int kLanes, int kVectors>
MK_INLINE void gelu(Floats<kLanes> (&x)[kVectors]) {
  if constexpr (kLanes < 8) {
    for (Floats<kLanes>& each : x)
      each *= Normal<kLanes>(each).cdf;
  } else {
    using Terms = EvenPart::Terms<(kLanes < 16 ? 4 : 16)>;
    constexpr int kDegree = Terms::kDegree;
    Floats<kLanes> center[kVectors]; // the low bits hold the integer
    Floats<kLanes> from_center[kVectors], square[kVectors], sums[kVectors][2];
    for (int v = 0; v < kVectors; ++v) {
      const Floats<kLanes> near =
          min_of<kLanes>(magnitude<kLanes>(x[v]), splat<kLanes>(EvenPart::kEnd));
      center[v] = near * Terms::kScale + kRound;
      from_center[v] = near * Terms::kScale - (center[v] - kRound);
      square[v] = from_center[v] * from_center[v];
    }
#pragma GCC unroll 16
    for (int i = kDegree; i >= 0; --i)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats<kLanes> term = looked_up<kLanes>(Terms::kOf[i], center[v]);
        sums[v][i % 2] = i > kDegree - 2 ? term : sums[v][i % 2] * square[v] + term;
      }
    for (int v = 0; v < kVectors; ++v) { // NaN stays NaN
      const Floats<kLanes> positive = max_of<kLanes>(Floats<kLanes>{}, x[v]);
      x[v] = positive + (sums[v][1] * from_center[v] + sums[v][0]);
    }
  }
}

} // namespace masked_kernels
