// y = epilogue(depthwise convolution of x with w . m), stride 1, of planes that keep their size.
//
// Of a column of the filter each row of pixels is loaded once, for all the rows of outputs in
// registers that it adds to. Where registers hold all outputs of a plane, it is read in place, with
// a mask for what lies beside its rows; else it is copied first, with the zeros around it.
#include "buffer.h"
#include "epilogue.h"
#include "planes.h"
#include "prefetch.h"
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

template <int kLanes>
MK_INLINE Ints<kLanes> lane_numbers() {
  Ints<kLanes> lane;
  for (int i = 0; i < kLanes; ++i)
    lane[i] = i;
  return lane;
}

// Whether registers hold a plane's outputs.
template <int kLanes>
bool is_held(const Planes& planes) {
  return planes.height == kRows && planes.width == kLanes;
}

// sums = the outputs of such a plane
template <int kLanes, int kKernel>
MK_INLINE void convolve_held(const float* x, const float* filter, Floats<kLanes> (&sums)[kRows]) {
  constexpr int kPad = kKernel / 2;
  const Ints<kLanes> lane = lane_numbers<kLanes>();
  for (Floats<kLanes>& sum : sums)
    sum = Floats<kLanes>{};
#pragma GCC unroll 1
  for (int shift = -kPad; shift <= kPad; ++shift, ++filter) {
    const Ints<kLanes> in_row = ((lane + shift) & -kLanes) == 0;
    Floats<kLanes> taps[kKernel];
#pragma GCC unroll 9
    for (int i = 0; i < kKernel; ++i)
      taps[i] = splat<kLanes>(filter[i * kKernel]);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Floats<kLanes> pixels =
          in_row ? load<kLanes>(x + row * kLanes + shift) : Floats<kLanes>{};
#pragma GCC unroll 9
      for (int i = 0; i < kKernel; ++i)
        if (0 <= row + kPad - i && row + kPad - i < kRows)
          sums[row + kPad - i] += pixels * taps[i];
    }
  }
}

// y [kCount, stride] = finished sums, of rows that begin with position `at` of the residual
template <int kLanes, int kCount>
MK_INLINE void finish_rows(const Finish<kLanes>& finish, const Floats<kLanes> (&sums)[kCount],
    int64_t at, int64_t residual_stride, float* y, int64_t stride) {
  constexpr int kAtOnce = kCount == 1 ? 1 : kLanes < 16 ? 2 : 4; // that registers hold
#pragma GCC unroll 8
  for (int row = 0; row < kCount; row += kAtOnce) {
    Floats<kLanes> v[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i)
      v[i] = sums[row + i];
    finish(v, at + row * residual_stride, residual_stride);
    for (int i = 0; i < kAtOnce; ++i)
      store<kLanes>(y + (row + i) * stride, v[i]);
  }
}

// filter [taps] = the values whose bit is set, else 0
template <int kLanes, int64_t kTaps>
MK_INLINE void load_filter(const float* values, const uint32_t* words, float* filter) {
  const Ints<kLanes> lane = lane_numbers<kLanes>();
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

// Memory for a plane with the zeros around it.
class Copy {
 public:
  explicit Copy(const Padded& padded)
      : padded_(padded), memory_(Buffer::zeros(padded.floats())),
        patches_(memory_.data() + padded.first_patch()) {}

  template <int kLanes>
  MK_INLINE void take(const float* x) const {
    for (int64_t row = 0; row < padded_.height; ++row)
      for (int64_t column = 0; column < padded_.width; column += kLanes, x += kLanes)
        store<kLanes>(center() + row * padded_.stride() + column, load<kLanes>(x));
  }

  // y = the finished outputs of the rows [first, first + kCount)
  template <int kLanes, int kKernel, int kCount>
  MK_INLINE void convolve(
      const float* filter, const Finish<kLanes>& finish, int64_t first, float* y) const {
    for (int64_t column = 0; column < padded_.width; column += kLanes) {
      const int64_t at = first * padded_.stride() + column;
      Floats<kLanes> sums[kCount];
      convolve_rows<kLanes, kKernel>(patches_ + at, padded_.stride(), filter, sums);
      finish_rows(
          finish, sums, at, padded_.stride(), y + first * padded_.width + column, padded_.width);
    }
  }

  float* center() const { return patches_ + padded_.center(); }

 private:
  const Padded padded_;
  const Buffer memory_;
  float* const patches_;
};

// Channels [channel, end) of planes.
template <int kLanes, int kKernel>
MK_INLINE void convolve_body(const Planes& planes, const DepthwiseConv2d& p,
    const RowWindows<float>& windows, int64_t channel, int64_t end) {
  constexpr int64_t kTaps = int64_t{kKernel} * kKernel;
  const Copy copy(Padded{planes.height, planes.width, kKernel});
  const bool held = is_held<kLanes>(planes);
  float filter[kTaps];
  for (; channel < end; ++channel) {
    load_filter<kLanes, kTaps>(
        windows.at(channel * kTaps % p.period), p.words + channel * words_per_row(kTaps), filter);
    const float* const x = p.x + channel * planes.stride();
    float* const y = p.y + channel * planes.stride();
    Epilogue epilogue = p.epilogue;
    if (epilogue.residual)
      epilogue.residual = held ? x : copy.center();
    const Finish<kLanes> finish(epilogue, channel);
    if (held) {
      // The next plane may be in another core's cache. Multiply-adds that wait for it would leave
      // no room for those that could run.
      if (channel + 1 < end)
        Ahead{x + planes.stride(), x + planes.stride() + planes.pixels()}.fetch();
      Floats<kLanes> sums[kRows];
      convolve_held<kLanes, kKernel>(x, filter, sums);
      finish_rows(finish, sums, 0, kLanes, y, kLanes);
      continue;
    }
    copy.take<kLanes>(x);
    int64_t row = 0;
    for (; row + kRows <= planes.height; row += kRows)
      copy.convolve<kLanes, kKernel, kRows>(filter, finish, row, y);
    for (; row < planes.height; ++row)
      copy.convolve<kLanes, kKernel, 1>(filter, finish, row, y);
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
