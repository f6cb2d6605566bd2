// y = epilogue(depthwise convolution of x with w . m), stride 1, of planes that keep their size.
//
// A plane is copied once, with the zeros around it. Of a column of the filter each row of pixels is
// loaded once, for all the rows of outputs in registers that it adds to.
#include "buffer.h"
#include "epilogue.h"
#include "planes.h"
#include "row_windows.h"

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

// sums [kOutputs, lanes] of adjacent rows; the patch of the first output begins with `x`
template <int kLanes, int kKernel, int kOutputs>
MK_INLINE void convolve_rows(
    const float* x, int64_t stride, const float* filter, Floats<kLanes> (&sums)[kOutputs]) {
  for (Floats<kLanes>& sum : sums)
    sum = Floats<kLanes>{};
#pragma GCC unroll 1
  for (int j = 0; j < kKernel; ++j, ++x, ++filter) {
    Floats<kLanes> taps[kKernel];
#pragma GCC unroll 9
    for (int i = 0; i < kKernel; ++i)
      taps[i] = splat<kLanes>(filter[i * kKernel]);
#pragma GCC unroll 64
    for (int row = 0; row < kOutputs + kKernel - 1; ++row) {
      const auto pixels = load<kLanes>(x + row * stride);
#pragma GCC unroll 9
      for (int i = 0; i < kKernel; ++i)
        if (0 <= row - i && row - i < kOutputs)
          sums[row - i] += pixels * taps[i];
    }
  }
}

// filter [taps] = the values whose bit is set, else 0
template <int kLanes, int64_t kTaps>
MK_INLINE void load_filter(const float* values, const uint32_t* words, float* filter) {
  Ints<kLanes> lane;
  for (int i = 0; i < kLanes; ++i)
    lane[i] = i;
#pragma GCC unroll 16
  for (int64_t tap = 0; tap < kTaps; tap += kLanes) {
    const int64_t count = std::min<int64_t>(kTaps - tap, kLanes);
    const Ints<kLanes> bits = (Ints<kLanes>{} + static_cast<int32_t>(words[tap / kWordBits])) >>
                              (lane + static_cast<int32_t>(tap % kWordBits));
    const Floats<kLanes> kept =
        (bits & 1) != 0 ? load<kLanes>(values + tap, count) : Floats<kLanes>{};
    store<kLanes>(filter + tap, kept, count);
  }
}

// Channels [channel, end) of planes.
template <int kLanes, int kKernel>
MK_INLINE void convolve_body(const Planes& planes, const DepthwiseConv2d& p,
    const RowWindows<float>& windows, int64_t channel, int64_t end) {
  constexpr int64_t kTaps = int64_t{kKernel} * kKernel;
  const Padded padded{planes.height, planes.width, kKernel};
  const Buffer buffer = Buffer::zeros(padded.floats());
  float* const patches = buffer.data() + padded.first_patch();
  float filter[kTaps];
  for (; channel < end; ++channel) {
    load_filter<kLanes, kTaps>(
        windows.at(channel * kTaps % p.period), p.words + channel * words_per_row(kTaps), filter);
    const float* x = p.x + channel * planes.stride();
    float* const y = p.y + channel * planes.stride();
    for (int64_t row = 0; row < planes.height; ++row)
      for (int64_t column = 0; column < planes.width; column += kLanes, x += kLanes)
        store<kLanes>(patches + padded.center() + row * padded.stride() + column, load<kLanes>(x));
    Epilogue epilogue = p.epilogue;
    if (epilogue.residual)
      epilogue.residual = patches + padded.center();
    const Finish<kLanes> finish(epilogue, channel);
    const auto convolve = [&](int64_t first, auto count) MK_INLINE_LAMBDA {
      constexpr int kRowsNow = count, kPair = kRowsNow > 1 ? 2 : 1;
      for (int64_t column = 0; column < planes.width; column += kLanes) {
        const int64_t at = first * padded.stride() + column;
        Floats<kLanes> sums[kRowsNow];
        convolve_rows<kLanes, kKernel>(patches + at, padded.stride(), filter, sums);
#pragma GCC unroll 8
        for (int row = 0; row < kRowsNow; row += kPair) {
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
MK_AVX2 void convolve(const Planes& planes, const DepthwiseConv2d& p,
    const RowWindows<float>& windows, int64_t channel, int64_t end) {
  convolve_body<8, kKernel>(planes, p, windows, channel, end);
}
} // namespace avx2

namespace avx512 {
template <int kKernel>
MK_AVX512 void convolve(const Planes& planes, const DepthwiseConv2d& p,
    const RowWindows<float>& windows, int64_t channel, int64_t end) {
  convolve_body<16, kKernel>(planes, p, windows, channel, end);
}
} // namespace avx512

template <int kKernel>
void convolve_as(const Planes& planes, const DepthwiseConv2d& p, const Exec& exec) {
  const RowWindows<float> windows(p.values, p.period, p.channels, kKernel * kKernel);
  const auto convolve =
      exec.isa == Isa::avx512 ? avx512::convolve<kKernel> : avx2::convolve<kKernel>;
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  exec.parallel.run(0, planes.channels, ceil_div(kGrain, planes.pixels() * kKernel * kKernel),
      [&](int64_t begin, int64_t end) { convolve(planes, p, windows, begin, end); });
}

} // namespace

bool has_planes(const DepthwiseConv2d& p) {
  return p.kernel_h == p.kernel_w && p.out_height() == p.height && p.out_width() == p.width &&
         (p.kernel_w == 3 || p.kernel_w == 5 || p.kernel_w == 7 || p.kernel_w == 9);
}

void depthwise_planes(const Planes& planes, const DepthwiseConv2d& p, const Exec& exec) {
  switch (p.kernel_w) {
  case 3:
    return convolve_as<3>(planes, p, exec);
  case 5:
    return convolve_as<5>(planes, p, exec);
  case 7:
    return convolve_as<7>(planes, p, exec);
  default:
    return convolve_as<9>(planes, p, exec);
  }
}

} // namespace masked_kernels
#endif
