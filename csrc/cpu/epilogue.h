// What a kernel does to its outputs before it stores them.
#pragma once

#include "gelu.h"

#include "masked_kernels/kernels.h"

namespace masked_kernels {

// v * gain + shift, for `count` channels from `channel` on
template <int kLanes>
MK_INLINE Floats<kLanes> transformed(
    const Affine& affine, const Floats<kLanes>& v, int64_t channel, int64_t count) {
  return v * load<kLanes>(affine.gain + channel, count) +
         load<kLanes>(affine.shift + channel, count);
}

// The epilogue of outputs `v` of `count` channels from `channel` on; y[at] is the first.
template <int kLanes>
MK_INLINE Floats<kLanes> finished(
    const Epilogue& epilogue, const Floats<kLanes>& v, int64_t channel, int64_t at, int64_t count) {
  Floats<kLanes> y = transformed<kLanes>(epilogue.before, v, channel, count);
  if (epilogue.activation == Activation::gelu)
    y = y * Normal<kLanes>(y).cdf;
  else if (epilogue.activation == Activation::relu)
    y = y < 0.0f ? Floats<kLanes>{} : y; // NaN stays NaN
  y = transformed<kLanes>(epilogue.after, y, channel, count);
  return epilogue.residual ? y + load<kLanes>(epilogue.residual + at, count) : y;
}

} // namespace masked_kernels
