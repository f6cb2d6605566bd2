// BatchNorm and ReLU in one. The backward computes anew which pixels passed the ReLU, so that only
// x is kept for it.
#include "batch_norm.h"

namespace masked_kernels {
namespace {

// Whose gradient grad_y is.
enum class Of { relu, norm };

// What a vector of channels, from channel c on, is normalised by. The difference from the mean
// comes first, which is exact of values far from 0 and near one another.
struct Norm {
  const float* mean; // of factors(), as scale and shift
  const float* scale = nullptr;
  const float* shift = nullptr;

  explicit Norm(const float* mean) : mean(mean) {}
  explicit Norm(const NormFactors& factors)
      : mean(factors.mean.data()), scale(factors.scale.data()), shift(factors.shift.data()) {}

  template <int kLanes>
  MK_INLINE Floats<kLanes> difference(const Floats<kLanes>& x, int64_t c) const {
    return x - load<kLanes>(mean + c);
  }

  // The same in the forward and the backward, which must agree on its sign.
  template <int kLanes>
  MK_INLINE Floats<kLanes> normalised(const Floats<kLanes>& difference, int64_t c) const {
    return difference * load<kLanes>(scale + c) + load<kLanes>(shift + c);
  }

  // The gradient of the normalised value.
  template <Of kOf, int kLanes>
  MK_INLINE Floats<kLanes> gradient(
      const Floats<kLanes>& grad_y, const Floats<kLanes>& difference, int64_t c) const {
    if constexpr (kOf == Of::norm)
      return grad_y;
    const Floats<kLanes> zero = {};
    Floats<kLanes> grad = grad_y;
    keep_loaded<kLanes>(grad);
    return normalised<kLanes>(difference, c) <= zero ? zero : grad; // NaN passes, as in PyTorch
  }
};

template <int kLanes, class Count>
MK_INLINE void add_to(double* totals, const Floats<kLanes>& sums, Count count) {
  typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
  Doubles total = {};
  std::memcpy(&total, totals, count * sizeof(double));
  total += __builtin_convertvector(sums, Doubles);
  std::memcpy(totals, &total, count * sizeof(double));
}

// Sums over the pixels of each part, by the terms add(first, second, c, at, count) of each vector.
template <class Terms>
struct Sums {
  Terms terms;
  int64_t channels;
  int64_t pixels = 0, parts = 1;
  double* totals = nullptr; // [parts, 2, channels], to be added to

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    const Sums o = *this; // which no store can change
    for (int64_t part = begin; part < end; ++part) {
      double* total = o.totals + part * 2 * o.channels;
      const int64_t last = o.pixels * (part + 1) / o.parts;
      for (int64_t top = o.pixels * part / o.parts; top < last; top += kBlock)
        for_vectors<kLanes>(o.channels, [&](int64_t c, auto count) MK_INLINE_LAMBDA {
          Floats<kLanes> first = {}, second = {};
          for (int64_t pixel = top; pixel < std::min(top + kBlock, last); ++pixel)
            o.terms.template add<kLanes>(first, second, c, pixel * o.channels + c, count);
          add_to<kLanes>(total + c, first, count);
          add_to<kLanes>(total + o.channels + c, second, count);
        });
    }
  }
};

// d = x - mean, and d²
struct Moments {
  const float* x;
  Norm norm;

  template <int kLanes>
  MK_INLINE void add(
      Floats<kLanes>& first, Floats<kLanes>& second, int64_t c, int64_t at, int64_t count) const {
    const Floats<kLanes> d = norm.difference<kLanes>(load<kLanes>(x + at, count), c);
    first += d;
    second += d * d;
  }
};

// d * grad and grad, the gradient of what was normalised
template <Of kOf>
struct Grads {
  const float* x;
  const float* grad_y;
  Norm norm;

  template <int kLanes>
  MK_INLINE void add(
      Floats<kLanes>& first, Floats<kLanes>& second, int64_t c, int64_t at, int64_t count) const {
    const Floats<kLanes> d = norm.difference<kLanes>(load<kLanes>(x + at, count), c);
    const Floats<kLanes> grad = norm.gradient<kOf, kLanes>(load<kLanes>(grad_y + at, count), d, c);
    first += d * grad;
    second += grad;
  }
};

// y = max(normalised + residual, 0)
struct Normalise {
  const float* x;
  const float* residual; // or null
  int64_t channels;
  Norm norm;
  float* y;

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    const Normalise o = *this; // which no store can change
    for_pixels<kLanes>(
        begin, end, o.channels, [&](int64_t c, int64_t at, auto count) MK_INLINE_LAMBDA {
          const Floats<kLanes> d =
              o.norm.template difference<kLanes>(load<kLanes>(o.x + at, count), c);
          Floats<kLanes> out = o.norm.template normalised<kLanes>(d, c);
          if (o.residual)
            out += load<kLanes>(o.residual + at, count);
          store<kLanes>(o.y + at, max_of<kLanes>(Floats<kLanes>{}, out), count);
        });
  }
};

// grad_x = (grad - shift - d * slope) * scale
template <Of kOf>
struct GradX {
  const float* x;
  const float* grad_y;
  int64_t channels;
  Norm norm;
  const float* slope; // of factors(), as shift
  const float* shift;
  float* grad_x;

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    const GradX o = *this; // which no store can change
    for_pixels<kLanes>(
        begin, end, o.channels, [&](int64_t c, int64_t at, auto count) MK_INLINE_LAMBDA {
          const Floats<kLanes> d =
              o.norm.template difference<kLanes>(load<kLanes>(o.x + at, count), c);
          const Floats<kLanes> grad =
              o.norm.template gradient<kOf, kLanes>(load<kLanes>(o.grad_y + at, count), d, c) -
              load<kLanes>(o.shift + c) - d * load<kLanes>(o.slope + c);
          store<kLanes>(o.grad_x + at, grad * load<kLanes>(o.norm.scale + c), count);
        });
  }
};

template <Of kOf>
void grads(const BatchNorm& p, const float* grad_y, bool of_batch, float* grad_x,
    float* grad_weight, float* grad_bias, const Exec& exec) {
  const NormFactors factors(p);
  const Norm norm(factors);
  const Sums<Grads<kOf>> sums{{p.x, grad_y, norm}, p.channels};
  store_grad_affine(p, total(sums, p.pixels, exec), grad_weight, grad_bias);
  const Correction correction(p, of_batch ? grad_weight : nullptr, grad_bias);
  run_pixels(GradX<kOf>{p.x, grad_y, p.channels, norm, correction.slope.data(),
                 correction.shift.data(), grad_x},
      p.pixels, exec);
}

} // namespace

void batch_norm_stats(
    const float* x, int64_t pixels, int64_t channels, float* mean, float* var, const Exec& exec) {
  const auto sums_about = [&](const float* shift) {
    return Sums<Moments>{{x, Norm(shift)}, channels};
  };
  batch_stats(sums_about, pixels, channels, mean, var, exec);
}

void batch_norm_relu(const BatchNorm& p, const float* residual, float* y, const Exec& exec) {
  const NormFactors factors(p);
  run_pixels(Normalise{p.x, residual, p.channels, Norm(factors), y}, p.pixels, exec);
}

void batch_norm_relu_grads(const BatchNorm& p, const float* grad_y, bool is_of_norm, bool of_batch,
    float* grad_x, float* grad_weight, float* grad_bias, const Exec& exec) {
  const auto run = is_of_norm ? grads<Of::norm> : grads<Of::relu>;
  run(p, grad_y, of_batch, grad_x, grad_weight, grad_bias, exec);
}

} // namespace masked_kernels
