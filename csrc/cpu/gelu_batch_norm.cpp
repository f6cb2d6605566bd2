// GELU and BatchNorm in one: each pass reads x, computes GELU anew, and keeps nothing of its size.
#include "batch_norm.h"
#include "gelu.h"

namespace masked_kernels {
namespace {

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
  int64_t channels;
  const float* shift; // of factors()
  int64_t pixels = 0, parts = 1;
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
    for_pixels<kLanes>(
        begin, end, o.channels, [&](int64_t c, int64_t at, auto count) MK_INLINE_LAMBDA {
          const Floats<kLanes> in = load<kLanes>(o.x + at, count);
          const Normal<kLanes> normal(in);
          const Floats<kLanes> d = in * normal.cdf - load<kLanes>(o.mean + c);
          const Floats<kLanes> grad = load<kLanes>(o.grad_y + at, count) -
                                      load<kLanes>(o.shift + c) - d * load<kLanes>(o.slope + c);
          const Floats<kLanes> slope_of_gelu = normal.cdf + in * kDensity * normal.bell;
          store<kLanes>(o.grad_x + at, grad * load<kLanes>(o.scale + c) * slope_of_gelu, count);
        });
  }
};

} // namespace

void gelu_stats(
    const float* x, int64_t pixels, int64_t channels, float* mean, float* var, const Exec& exec) {
  batch_stats([&](const float* shift) { return Sums<false>{x, nullptr, channels, shift}; }, pixels,
      channels, mean, var, exec);
}

void gelu_batch_norm(const BatchNorm& p, const float* residual, float* y, const Exec& exec) {
  const NormFactors norm(p);
  run_pixels(Normalise{p.x, residual, p.channels, norm.mean.data(), norm.scale.data(),
                 norm.shift.data(), y},
      p.pixels, exec);
}

void gelu_batch_norm_grads(const BatchNorm& p, const float* grad_y, bool of_batch, float* grad_x,
    float* grad_weight, float* grad_bias, const Exec& exec) {
  const NormFactors norm(p);
  store_grad_affine(p, total(Sums<true>{p.x, grad_y, p.channels, norm.mean.data()}, p.pixels, exec),
      grad_weight, grad_bias);
  const Correction correction(p, of_batch ? grad_weight : nullptr, grad_bias);
  run_pixels(GradX{p.x, grad_y, p.channels, norm.mean.data(), correction.slope.data(),
                 correction.shift.data(), norm.scale.data(), grad_x},
      p.pixels, exec);
}

} // namespace masked_kernels
