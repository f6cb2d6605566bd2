// What a kernel does to its outputs before it stores them.
#pragma once

#include "gelu.h"

#include "masked_kernels/kernels.h"

namespace masked_kernels {

// The epilogue of `count` channels from `channel` on, a vector or less. It holds all that it needs:
// no store to the outputs can change it.
template <int kLanes>
class Finish {
 public:
  MK_INLINE Finish(const Epilogue& epilogue, int64_t channel, int64_t count)
      : before_(epilogue.before, channel, count), after_(epilogue.after, channel, count),
        activation_(epilogue.activation), residual_(epilogue.residual), count_(count) {}

  // y[at] is the first of the outputs `v`.
  MK_INLINE Floats<kLanes> operator()(const Floats<kLanes>& v, int64_t at) const {
    Floats<kLanes> y = v * before_.gain + before_.shift;
    if (activation_ == Activation::gelu)
      y = gelu<kLanes>(y);
    else if (activation_ == Activation::relu)
      y = y < 0.0f ? Floats<kLanes>{} : y; // NaN stays NaN
    y = y * after_.gain + after_.shift;
    return residual_ ? y + load<kLanes>(residual_ + at, count_) : y;
  }

 private:
  struct Channels {
    Floats<kLanes> gain, shift;

    MK_INLINE Channels(const Affine& affine, int64_t channel, int64_t count)
        : gain(load<kLanes>(affine.gain + channel, count)),
          shift(load<kLanes>(affine.shift + channel, count)) {}
  };

  Channels before_, after_;
  Activation activation_;
  const float* residual_;
  int64_t count_;
};

// A vector or less of adjacent channels in several pixels, from sums [pixels, sum_stride] to
// y [pixels, y_stride]: with the epilogue, which y[at] begins, or without one times scale, plus
// bias.
template <int kLanes>
struct Outputs {
  const float* sums;
  int64_t sum_stride, pixels, count;
  float* y;
  int64_t y_stride;

  MK_INLINE void finish(const Epilogue& epilogue, int64_t channel, int64_t at, int64_t step) const {
    const Outputs o = *this; // which no store to y can change
    with_count<kLanes>(o.count, [&](auto count) MK_INLINE_LAMBDA {
      const Finish<kLanes> finish(epilogue, channel, count);
      for (int64_t i = 0; i < o.pixels; ++i)
        store<kLanes>(o.y + i * o.y_stride,
            finish(load<kLanes>(o.sums + i * o.sum_stride), at + i * step), count);
    });
  }

  MK_INLINE void shift(float scale, const Floats<kLanes>& bias) const {
    const Outputs o = *this;
    with_count<kLanes>(o.count, [&](auto count) MK_INLINE_LAMBDA {
      for (int64_t i = 0; i < o.pixels; ++i)
        store<kLanes>(
            o.y + i * o.y_stride, load<kLanes>(o.sums + i * o.sum_stride) * scale + bias, count);
    });
  }
};

} // namespace masked_kernels
