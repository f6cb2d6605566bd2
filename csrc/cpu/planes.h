// One image with the pixels of a channel adjacent, a *plane*: what the kernels of a chain pass on
// to one another where vectors are wide. A vector holds pixels of one channel, so that nothing is
// transposed on the way to tables of sums, and the taps of a filter are scalars.
#pragma once

#include "target.h"

#include "masked_kernels/kernels.h"

#if MK_X86
namespace masked_kernels {

// An image [channels, height, width], with stride() floats from plane to plane, aligned to cache
// lines. Between planes and for kVector floats before the first one there is memory that may be
// read.
struct Planes {
  static constexpr int64_t kVector = 16; // pixels
  static constexpr int64_t kSquare = 8;  // channels that are transposed at once

  int64_t channels, height, width;

  int64_t pixels() const { return height * width; }

  // No power of two: planes would fight over the same cache sets.
  int64_t stride() const { return (pixels() / kVector | 1) * kVector; }

  // No vector has pixels of two rows.
  bool are_whole_vectors() const {
    return width > 0 && width % kVector == 0 && channels % kSquare == 0;
  }
};

// planes = pixels [pixels, channels], and the way back
void to_planes(const Planes& planes, const float* pixels, float* to, const Exec& exec);
void from_planes(const Planes& planes, const float* from, float* pixels, const Exec& exec);

// As depthwise_conv2d, in planes: y may be x, and a residual is.
void depthwise_planes(const Planes& planes, const DepthwiseConv2d& params, const Exec& exec);
bool has_planes(const DepthwiseConv2d& params);

// As aligned_linear, in planes: y may be x, and a residual is.
void aligned_planes(const Planes& planes, const AlignedLinear& params, const Exec& exec);
bool has_planes(const AlignedLinear& params);

} // namespace masked_kernels
#endif
