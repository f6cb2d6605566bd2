// y = epilogue(depthwise convolution of x with w . m), stride 1, of planes that keep their size.
//
// A plane is copied once, with the zeros around it. Of a column of the filter each row of pixels is
// loaded once, for all the rows of outputs in registers that it adds to.
#include "buffer.h"
#include "epilogue.h"
#include "planes.h"

#include <algorithm>

#if MK_X86
namespace masked_kernels {
namespace {

constexpr int kRows = 16; // of outputs in registers

// A plane with zeros around it. Those of a whole vector part two rows, so that rows begin where
// cache lines do.
struct Padded {
  int64_t height, width, kernel;

  int64_t pad() const { return kernel / 2; }
  int64_t stride() const { return width + Planes::kVector; }
  int64_t floats() const { return (height + kernel - 1) * stride() + Planes::kVector; }
  int64_t first_patch() const { return Planes::kVector - pad(); }
  int64_t center() const { return pad() * stride() + pad(); } // of a patch
};

// sums [rows, lanes] of the outputs whose first pixel of the patch is `x`
template <int kLanes, int kKernel, int kRows>
MK_INLINE void convolve_rows(
    const float* x, int64_t stride, const float* filter, Floats<kLanes> (&sums)[kRows]) {
  for (Floats<kLanes>& sum : sums)
    sum = Floats<kLanes>{};
#pragma GCC unroll 1
  for (int j = 0; j < kKernel; ++j, ++x, ++filter) {
    Floats<kLanes> taps[kKernel];
#pragma GCC unroll 9
    for (int i = 0; i < kKernel; ++i)
      taps[i] = splat<kLanes>(filter[i * kKernel]);
#pragma GCC unroll 64
    for (int row = 0; row < kRows + kKernel - 1; ++row) {
      const auto pixels = load<kLanes>(x + row * stride);
#pragma GCC unroll 9
      for (int i = 0; i < kKernel; ++i)
        if (0 <= row - i && row - i < kRows)
          sums[row - i] += pixels * taps[i];
    }
  }
}

template <int kLanes, int kKernel>
MK_INLINE void convolve_body(const Planes& planes, const DepthwiseConv2d& p, const float* filters,
    int64_t channel, int64_t end) {
  const Padded padded{planes.height, planes.width, kKernel};
  constexpr int64_t kTaps = int64_t{kKernel} * kKernel;
  const Buffer buffer = Buffer::zeros(2 * padded.floats());
  // Of the next plane while this one is in work: what was just stored cannot be loaded at once by
  // vectors that begin elsewhere.
  const auto copy = [&](int64_t channel) MK_INLINE_LAMBDA {
    const float* from = p.x + channel * planes.stride();
    float* to =
        buffer.data() + channel % 2 * padded.floats() + padded.first_patch() + padded.center();
    for (int64_t row = 0; row < planes.height; ++row, to += padded.stride())
      for (int64_t column = 0; column < planes.width; column += kLanes, from += kLanes)
        store<kLanes>(to + column, load<kLanes>(from));
  };
  for (; channel < end; ++channel) {

    copy(channel);
    const float* const patches =
        buffer.data() + channel % 2 * padded.floats() + padded.first_patch();
    float* const y = p.y + channel * planes.stride();
    Epilogue epilogue = p.epilogue;
    if (epilogue.residual)
      epilogue.residual = patches + padded.center();
    const Finish<kLanes> finish(epilogue, channel);
    const auto convolve = [&](int64_t first, auto rows) MK_INLINE_LAMBDA {
      constexpr int kPair = std::min<int>(rows, 2);
      for (int64_t column = 0; column < planes.width; column += kLanes) {
        const int64_t at = first * padded.stride() + column;
        Floats<kLanes> sums[rows];
        convolve_rows<kLanes, kKernel>(
            patches + at, padded.stride(), filters + channel * kTaps, sums);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row += kPair) {
          Floats<kLanes> pair[kPair];
          for (int i = 0; i < kPair; ++i)
            pair[i] = sums[row + i];
          finish(pair, at + row * padded.stride(), padded.stride());
          for (int i = 0; i < kPair; ++i)
            store<kLanes>(y + (first + row + i) * planes.width + column, pair[i]);
        }
      }
    };
    int64_t row = 0;
    for (; row + kRows <= planes.height; row += kRows)
      convolve(row, std::integral_constant<int, kRows>{});
    for (; row < planes.height; ++row)
      convolve(row, std::integral_constant<int, 1>{});
  }
}

namespace avx2 {
template <int kKernel>
MK_AVX2 void convolve(const Planes& planes, const DepthwiseConv2d& p, const float* filters,
    int64_t channel, int64_t end) {
  convolve_body<8, kKernel>(planes, p, filters, channel, end);
}
} // namespace avx2

namespace avx512 {
template <int kKernel>
MK_AVX512 void convolve(const Planes& planes, const DepthwiseConv2d& p, const float* filters,
    int64_t channel, int64_t end) {
  convolve_body<16, kKernel>(planes, p, filters, channel, end);
}
} // namespace avx512

template <int kKernel>
void convolve_as(
    const Planes& planes, const DepthwiseConv2d& p, const float* filters, const Exec& exec) {
  const auto convolve =
      exec.isa == Isa::avx512 ? avx512::convolve<kKernel> : avx2::convolve<kKernel>;
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  exec.parallel.run(0, planes.channels, ceil_div(kGrain, planes.pixels() * kKernel * kKernel),
      [&](int64_t begin, int64_t end) { convolve(planes, p, filters, begin, end); });
}

} // namespace

bool has_planes(const DepthwiseConv2d& p) {
  return p.kernel_h == p.kernel_w && p.out_height() == p.height && p.out_width() == p.width &&
         (p.kernel_w == 3 || p.kernel_w == 5 || p.kernel_w == 7 || p.kernel_w == 9);
}

void depthwise_planes(
    const Planes& planes, const DepthwiseConv2d& p, const float* filters, const Exec& exec) {
  switch (p.kernel_w) {
  case 3:
    return convolve_as<3>(planes, p, filters, exec);
  case 5:
    return convolve_as<5>(planes, p, filters, exec);
  case 7:
    return convolve_as<7>(planes, p, filters, exec);
  default:
    return convolve_as<9>(planes, p, filters, exec);
  }
}

} // namespace masked_kernels
#endif
