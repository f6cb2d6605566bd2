// GELU and BatchNorm in one: each pass reads x, computes GELU anew, and keeps nothing of its size.
#include "buffer.h"
#include "gelu.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace masked_kernels {
namespace {

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kBlock = 16;  // pixels summed in float before the sums are added up in double
constexpr int64_t kFirst = 256; // pixels that a variance takes a first mean from
constexpr int64_t kPartPixels = 256; // the fewest that a thread sums

// Per-channel factors, with room for a whole vector at the end.
Buffer factors(int64_t channels) {
  return Buffer::zeros(channels + kMaxLanes);
}

Buffer means(const GeluBatchNorm& p) {
  Buffer mean = factors(p.channels);
  std::copy_n(p.mean, p.channels, mean.data());
  return mean;
}

// fn(GELU(x), c, at, count) for each vector of a pixel's channels: it begins with channel c, which
// is x[at].
template <int kLanes, class Fn>
MK_INLINE void for_gelu(const float* x, int64_t pixel, int64_t channels, const Fn& fn) {
  for_vector_pairs<kLanes>(channels, [&](int64_t c, auto vectors, auto count) MK_INLINE_LAMBDA {
    int64_t at = pixel * channels + c;
    Floats<kLanes> v[vectors];
    for (int i = 0; i < vectors; ++i)
      v[i] = load<kLanes>(x + at + i * kLanes, count);
    gelu<kLanes>(v);
    for (int i = 0; i < vectors; ++i, c += kLanes, at += kLanes)
      fn(v[i], c, at, count);
  });
}

// Sums over the pixels of each part: with d = GELU(x) - shift, of d and d², or of d * grad_y and
// grad_y.
template <bool kOfGrad>
struct Sums {
  const float* x;
  const float* grad_y; // or null
  int64_t pixels, channels;
  const float* shift; // of factors()
  int64_t parts = 1;
  double* totals = nullptr; // [parts, 2, channels], to be added to

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    const Sums o = *this; // which no store can change
    const Buffer firsts = factors(channels), seconds = factors(channels);
    float *const first = firsts.data(), *const second = seconds.data();
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = pixels * (part + 1) / parts;
      for (int64_t top = pixels * part / parts; top < last; top += kBlock) {
        std::fill_n(first, channels, 0.0f);
        std::fill_n(second, channels, 0.0f);
        for (int64_t pixel = top; pixel < std::min(top + kBlock, last); ++pixel)
          for_gelu<kLanes>(o.x, pixel, o.channels,
              [&](const Floats<kLanes>& in, int64_t c, int64_t at, auto count) MK_INLINE_LAMBDA {
                const Floats<kLanes> d = in - load<kLanes>(o.shift + c);
                const Floats<kLanes> grad = kOfGrad ? load<kLanes>(o.grad_y + at, count) : d;
                store<kLanes>(first + c, load<kLanes>(first + c) + (kOfGrad ? d * grad : d));
                store<kLanes>(second + c, load<kLanes>(second + c) + (kOfGrad ? grad : d * d));
              });
        double* total = totals + part * 2 * channels;
        for (int64_t c = 0; c < channels; ++c) {
          total[c] += first[c];
          total[channels + c] += second[c];
        }
      }
    }
  }
};

// y = (GELU(x) - mean) * scale + shift + residual. The difference comes first: of values far from 0
// and near one another it is exact.
struct Normalise {
  const float* x;
  const float* residual; // or null
  int64_t channels;
  const float* mean; // of factors(), as scale and shift
  const float* scale;
  const float* shift;
  float* y;

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    const Normalise o = *this; // which no store can change
    for (int64_t pixel = begin; pixel < end; ++pixel)
      for_gelu<kLanes>(o.x, pixel, o.channels,
          [&](const Floats<kLanes>& in, int64_t c, int64_t at, auto count) MK_INLINE_LAMBDA {
            const Floats<kLanes> d = in - load<kLanes>(o.mean + c);
            Floats<kLanes> out = d * load<kLanes>(o.scale + c) + load<kLanes>(o.shift + c);
            if (o.residual)
              out += load<kLanes>(o.residual + at, count);
            store<kLanes>(o.y + at, out, count);
          });
  }
};

// grad_x = (grad_y - shift - (GELU(x) - mean) * slope) * scale * GELU'(x)
struct GradX {
  const float* x;
  const float* grad_y;
  int64_t channels;
  const float* mean; // of factors(), as slope, shift and scale
  const float* slope;
  const float* shift;
  const float* scale;
  float* grad_x;

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    constexpr float kDensity = 0.398942280f; // 1 / sqrt(2 pi)
    const GradX o = *this;                   // which no store can change
    for (int64_t pixel = begin; pixel < end; ++pixel)
      for_vectors<kLanes>(o.channels, [&](int64_t c, auto count) MK_INLINE_LAMBDA {
        const int64_t at = pixel * o.channels + c;
        const Floats<kLanes> in = load<kLanes>(o.x + at, count);
        const Normal<kLanes> normal(in);
        const Floats<kLanes> d = in * normal.cdf - load<kLanes>(o.mean + c);
        const Floats<kLanes> grad = load<kLanes>(o.grad_y + at, count) - load<kLanes>(o.shift + c) -
                                    d * load<kLanes>(o.slope + c);
        const Floats<kLanes> slope_of_gelu = normal.cdf + in * kDensity * normal.bell;
        store<kLanes>(o.grad_x + at, grad * load<kLanes>(o.scale + c) * slope_of_gelu, count);
      });
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

// The two sums [2, channels]. Threads share parts whose number depends on nothing but the shape, so
// that sums are the same for any number of threads.
template <bool kOfGrad>
std::vector<double> total(Sums<kOfGrad> sums, const Exec& exec) {
  constexpr int64_t kMostParts = 32;
  const int64_t floats = 2 * sums.channels;
  sums.parts = std::clamp<int64_t>(sums.pixels / kPartPixels, 1, kMostParts);
  std::vector<double> totals(sums.parts * floats);
  sums.totals = totals.data();
  const auto run = MK_BY_ISA(exec.isa, run<Sums<kOfGrad>>);
  exec.parallel.run(0, sums.parts, 1, [&](int64_t begin, int64_t end) { run(sums, begin, end); });
  for (int64_t i = floats; i < sums.parts * floats; ++i)
    totals[i % floats] += totals[i];
  totals.resize(floats);
  return totals;
}

template <class Pass>
void run_pixels(const Pass& pass, int64_t pixels, const Exec& exec) {
  constexpr int64_t kGrain = 1 << 14; // elements worth waking a thread for
  const auto run = MK_BY_ISA(exec.isa, run<Pass>);
  exec.parallel.run(0, pixels, ceil_div(kGrain, std::max<int64_t>(pass.channels, 1)),
      [&](int64_t begin, int64_t end) { run(pass, begin, end); });
}

double inverse_deviation(const GeluBatchNorm& p, int64_t channel) {
  return 1 / std::sqrt(double{p.var[channel]} + p.eps);
}

double weight(const GeluBatchNorm& p, int64_t channel) {
  return p.weight ? p.weight[channel] : 1;
}

} // namespace

void gelu_stats(
    const float* x, int64_t pixels, int64_t channels, float* mean, float* var, const Exec& exec) {
  // About the mean of the first pixels: the squares of values far from 0 would drown their
  // variance.
  const int64_t first = std::min(pixels, kFirst);
  Buffer zero = factors(channels), shift = factors(channels);
  const std::vector<double> first_sum =
      total(Sums<false>{x, nullptr, first, channels, zero.data()}, exec);
  for (int64_t c = 0; c < channels; ++c)
    shift[c] = static_cast<float>(first_sum[c] / first);
  const std::vector<double> sums =
      total(Sums<false>{x, nullptr, pixels, channels, shift.data()}, exec);
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = sums[c] / pixels;
    mean[c] = static_cast<float>(shift[c] + offset);
    var[c] = static_cast<float>(std::max(sums[channels + c] / pixels - offset * offset, 0.0));
  }
}

void gelu_batch_norm(const GeluBatchNorm& p, const float* residual, float* y, const Exec& exec) {
  Buffer mean = means(p), scale = factors(p.channels), shift = factors(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    scale[c] = static_cast<float>(weight(p, c) * inverse_deviation(p, c));
    shift[c] = p.bias ? p.bias[c] : 0;
  }
  run_pixels(Normalise{p.x, residual, p.channels, mean.data(), scale.data(), shift.data(), y},
      p.pixels, exec);
}

void gelu_batch_norm_grad_affine(const GeluBatchNorm& p, const float* grad_y, float* grad_weight,
    float* grad_bias, const Exec& exec) {
  Buffer mean = means(p);
  const std::vector<double> sums =
      total(Sums<true>{p.x, grad_y, p.pixels, p.channels, mean.data()}, exec);
  for (int64_t c = 0; c < p.channels; ++c) {
    grad_weight[c] = static_cast<float>(sums[c] * inverse_deviation(p, c));
    grad_bias[c] = static_cast<float>(sums[p.channels + c]);
  }
}

void gelu_batch_norm_grad_x(const GeluBatchNorm& p, const float* grad_y, const float* grad_weight,
    const float* grad_bias, float* grad_x, const Exec& exec) {
  Buffer mean = means(p), slope = factors(p.channels), shift = factors(p.channels);
  Buffer scale = factors(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    const double inverse = inverse_deviation(p, c);
    scale[c] = static_cast<float>(weight(p, c) * inverse);
    if (grad_weight == nullptr)
      continue;
    slope[c] = static_cast<float>(inverse * grad_weight[c] / p.pixels);
    shift[c] = grad_bias[c] / p.pixels;
  }
  run_pixels(
      GradX{p.x, grad_y, p.channels, mean.data(), slope.data(), shift.data(), scale.data(), grad_x},
      p.pixels, exec);
}

} // namespace masked_kernels
