// What the kernels of BatchNorm share: sums over pixels, statistics from them, per-channel factors.
#pragma once

#include "buffer.h"
#include "vector.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace masked_kernels {

constexpr int64_t kBlock = 16; // pixels summed in float before the sums are added up in double

// Per-channel factors, with room for a whole vector at the end.
inline Buffer factors(int64_t channels) {
  constexpr int64_t kMaxLanes = 16;
  return Buffer::zeros(channels + kMaxLanes);
}

inline double inverse_deviation(const BatchNorm& p, int64_t channel) {
  return 1 / std::sqrt(double{p.var[channel]} + p.eps);
}

// n = (v - mean) * scale + shift
struct NormFactors {
  Buffer mean, scale, shift; // factors()

  explicit NormFactors(const BatchNorm& p)
      : mean(factors(p.channels)), scale(factors(p.channels)), shift(factors(p.channels)) {
    for (int64_t c = 0; c < p.channels; ++c) {
      mean[c] = p.mean[c];
      scale[c] = static_cast<float>((p.weight ? p.weight[c] : 1) * inverse_deviation(p, c));
      shift[c] = p.bias ? p.bias[c] : 0;
    }
  }
};

// Of grad_x = (grad_y - shift - d * slope) * scale, what comes of mean and variance that move with
// x; d is the difference from the mean. Zeros where grad_weight is null: they are constants.
struct Correction {
  Buffer slope, shift; // factors()

  Correction(const BatchNorm& p, const float* grad_weight, const float* grad_bias)
      : slope(factors(p.channels)), shift(factors(p.channels)) {
    for (int64_t c = 0; grad_weight && c < p.channels; ++c) {
      slope[c] = static_cast<float>(inverse_deviation(p, c) * grad_weight[c] / p.pixels);
      shift[c] = grad_bias[c] / p.pixels;
    }
  }
};

namespace scalar {
template <class Pass>
void run(const Pass& pass, int64_t begin, int64_t end) {
  pass.template run<4>(begin, end);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
template <class Pass>
MK_AVX2 void run(const Pass& pass, int64_t begin, int64_t end) {
  pass.template run<8>(begin, end);
}
} // namespace avx2

namespace avx512 {
template <class Pass>
MK_AVX512 void run(const Pass& pass, int64_t begin, int64_t end) {
  pass.template run<16>(begin, end);
}
} // namespace avx512
#endif

// fn(c, at, count) for each vector of the channels of the pixels [begin, end): it begins with
// channel c, which is x[at].
template <int kLanes, class Fn>
MK_INLINE void for_pixels(int64_t begin, int64_t end, int64_t channels, const Fn& fn) {
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for_vectors<kLanes>(channels,
        [&](int64_t c, auto count) MK_INLINE_LAMBDA { fn(c, pixel * channels + c, count); });
}

template <class Pass>
void run_pixels(const Pass& pass, int64_t pixels, const Exec& exec) {
  constexpr int64_t kGrain = 1 << 14; // elements worth waking a thread for
  const auto run = MK_BY_ISA(exec.isa, run<Pass>);
  exec.parallel.run(0, pixels, ceil_div(kGrain, std::max<int64_t>(pass.channels, 1)),
      [&](int64_t begin, int64_t end) { run(pass, begin, end); });
}

// Two sums over pixels, of each channel; `pass` adds the sums of a part of the pixels to
// totals [parts, 2, channels]. Threads share parts whose number depends on nothing but the shape,
// so that sums are the same for any number of threads.
template <class Pass>
std::vector<double> total(Pass pass, int64_t pixels, const Exec& exec) {
  constexpr int64_t kPartPixels = 256, kMostParts = 32;
  const int64_t sums = 2 * pass.channels;
  pass.pixels = pixels;
  pass.parts = std::clamp<int64_t>(pixels / kPartPixels, 1, kMostParts);
  std::vector<double> totals(pass.parts * sums);
  pass.totals = totals.data();
  const auto run = MK_BY_ISA(exec.isa, run<Pass>);
  exec.parallel.run(0, pass.parts, 1, [&](int64_t begin, int64_t end) { run(pass, begin, end); });
  for (int64_t i = sums; i < pass.parts * sums; ++i)
    totals[i % sums] += totals[i];
  totals.resize(sums);
  return totals;
}

// Mean and biased variance of values whose sums sums_about(shift) takes: of d = value - shift and
// of d². About the mean of the first pixels: the squares of values far from 0 would drown their
// variance.
template <class SumsAbout>
void batch_stats(const SumsAbout& sums_about, int64_t pixels, int64_t channels, float* mean,
    float* var, const Exec& exec) {
  constexpr int64_t kFirst = 256;
  const int64_t first = std::min(pixels, kFirst);
  const Buffer zero = factors(channels), shift = factors(channels);
  const std::vector<double> first_sums = total(sums_about(zero.data()), first, exec);
  for (int64_t c = 0; c < channels; ++c)
    shift[c] = static_cast<float>(first_sums[c] / first);
  const std::vector<double> sums = total(sums_about(shift.data()), pixels, exec);
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = sums[c] / pixels;
    mean[c] = static_cast<float>(shift[c] + offset);
    var[c] = static_cast<float>(std::max(sums[channels + c] / pixels - offset * offset, 0.0));
  }
}

// The gradients of weight and bias from the sums of d * grad_y and of grad_y.
inline void store_grad_affine(
    const BatchNorm& p, const std::vector<double>& sums, float* grad_weight, float* grad_bias) {
  for (int64_t c = 0; c < p.channels; ++c) {
    grad_weight[c] = static_cast<float>(sums[c] * inverse_deviation(p, c));
    grad_bias[c] = static_cast<float>(sums[p.channels + c]);
  }
}

} // namespace masked_kernels
