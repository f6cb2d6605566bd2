// What a kernel does to its outputs before it stores them.
#pragma once

#include "gelu.h"

#include "masked_kernels/kernels.h"

namespace masked_kernels {

// An affine map of a vector: of `count` channels from `channel` on, or of pixels of one channel.
template <int kLanes>
struct Map {
  Floats<kLanes> gain, shift;

  MK_INLINE Map(const Affine& affine, int64_t channel, int64_t count)
      : gain(load<kLanes>(affine.gain + channel, count)),
        shift(load<kLanes>(affine.shift + channel, count)) {}

  MK_INLINE Map(const Affine& affine, int64_t channel)
      : gain(splat<kLanes>(affine.gain[channel])), shift(splat<kLanes>(affine.shift[channel])) {}

  MK_INLINE Floats<kLanes> operator()(const Floats<kLanes>& v) const { return v * gain + shift; }
};

// The epilogue of `count` channels from `channel` on, a vector or less, or, without a count, of
// pixels of one channel. It holds all that it needs: no store to the outputs can change it.
template <int kLanes>
class Finish {
 public:
  MK_INLINE Finish(const Epilogue& epilogue, int64_t channel, int64_t count)
      : Finish(
            epilogue, {epilogue.before, channel, count}, {epilogue.after, channel, count}, count) {}

  MK_INLINE Finish(const Epilogue& epilogue, int64_t channel)
      : Finish(epilogue, {epilogue.before, channel}, {epilogue.after, channel}, kLanes) {}

  // Several vectors of outputs; those of y[at + i * step] and the following are v[i].
  template <int kVectors>
  MK_INLINE void operator()(Floats<kLanes> (&v)[kVectors], int64_t at, int64_t step = 0) const {
    run([&](int) MK_INLINE_LAMBDA -> const Finish& { return *this; }, v, at, step);
  }

  // The same of a vector of each of several channels.
  template <int kVectors>
  MK_INLINE static void each(
      const Finish (&of)[kVectors], Floats<kLanes> (&v)[kVectors], int64_t at, int64_t step) {
    run([&](int i) MK_INLINE_LAMBDA -> const Finish& { return of[i]; }, v, at, step);
  }

 private:
  MK_INLINE Finish(
      const Epilogue& epilogue, const Map<kLanes>& before, const Map<kLanes>& after, int64_t count)
      : before_(before), after_(after), activation_(epilogue.activation),
        residual_(epilogue.residual), count_(count) {}

  template <class FinishOf, int kVectors>
  MK_INLINE static void run(
      const FinishOf& of, Floats<kLanes> (&v)[kVectors], int64_t at, int64_t step) {
    const Activation activation = of(0).activation_;
    for (int i = 0; i < kVectors; ++i)
      v[i] = of(i).before_(v[i]);
    if (activation == Activation::gelu)
      gelu<kLanes>(v);
    else if (activation == Activation::relu)
      for (Floats<kLanes>& each : v)
        each = max_of<kLanes>(Floats<kLanes>{}, each); // NaN stays NaN
    for (int i = 0; i < kVectors; ++i) {
      v[i] = of(i).after_(v[i]);
      if (of(i).residual_)
        v[i] += load<kLanes>(of(i).residual_ + at + i * step, of(i).count_);
    }
  }

  Map<kLanes> before_, after_;
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
      const auto finish_pixels = [&](int64_t first, auto pixels) MK_INLINE_LAMBDA {
        Floats<kLanes> v[pixels];
        for (int i = 0; i < pixels; ++i)
          v[i] = load<kLanes>(o.sums + (first + i) * o.sum_stride);
        finish(v, at + first * step, step);
        for (int i = 0; i < pixels; ++i)
          store<kLanes>(o.y + (first + i) * o.y_stride, v[i], count);
      };
      int64_t i = 0;
      for (; i + 2 <= o.pixels; i += 2)
        finish_pixels(i, std::integral_constant<int, 2>{});
      if (i < o.pixels)
        finish_pixels(i, std::integral_constant<int, 1>{});
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
