// The gradient of a depthwise convolution's filters (stride 1, pixels of adjacent channels):
// grad_weight[c, r, s] = sum over b, i, j of grad_y[b, i, j, c] * x[b, i + r - pad_h, j + s -
// pad_w, c].
//
// A vector holds channels of one pixel. Those channels of an image are first copied together, x
// inside a border of zeros: then no tap needs a test, and pixels a power of two apart do not fight
// over the same cache sets. One pass over the copies keeps the sums of all taps in registers, or of
// as many rows of taps as fit.
#include "buffer.h"
#include "vector.h"

#include "masked_kernels/kernels.h"

#include <algorithm>

namespace masked_kernels {
namespace {

constexpr int64_t kGroup = 16;           // channels that a thread takes at once
constexpr int64_t kBandFloats = 1 << 16; // of x in a band of rows, which must stay in the L2 cache

// The rows of taps whose sums fit the registers beside an x and a grad_y, a divisor of all.
constexpr int tap_rows(int taps, int registers) {
  int rows = taps;
  while (rows > 1 && (taps % rows != 0 || rows * taps + 2 > registers))
    --rows;
  return rows;
}

struct Band {
  const float* x;      // [height + taps - 1, width + taps - 1, lanes]
  const float* grad_y; // [height, width, lanes]
  int64_t height, width;
};

// sums [rows, taps, lanes] += those of the taps of kRows rows, x starting at the first of them
template <int kLanes, int kTaps, int kRows>
MK_INLINE void add_taps(const Band& band, const float* x, float* sums) {
  const int64_t x_row = (band.width + kTaps - 1) * kLanes;
  Floats<kLanes> acc[kRows][kTaps] = {};
  const float* grad_y = band.grad_y;
  for (int64_t i = 0; i < band.height; ++i)
    for (int64_t j = 0; j < band.width; ++j, grad_y += kLanes) {
      const float* at = x + i * x_row + j * kLanes;
      // Hides that steps read the same x, which GCC would keep in registers that there are not.
      asm("" : "+r"(at));
      const auto grad = load<kLanes>(grad_y);
#pragma GCC unroll 9
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 9
        for (int s = 0; s < kTaps; ++s)
          acc[r][s] += grad * load<kLanes>(at + r * x_row + s * kLanes);
    }
#pragma GCC unroll 9
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 9
    for (int s = 0; s < kTaps; ++s, sums += kLanes)
      store<kLanes>(sums, load<kLanes>(sums) + acc[r][s]);
}

// to [count, kLanes] = the first `lanes` channels of pixels `stride` apart
template <int kLanes>
MK_INLINE void copy_pixels(
    const float* from, int64_t stride, int64_t lanes, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i)
    store<kLanes>(to + i * kLanes, load<kLanes>(from + i * stride, lanes));
}

// grad_weight of channels [begin, end)
template <int kLanes, int kTaps, int kRows>
MK_INLINE void grad_channels_body(const DepthwiseGrad& p, int64_t begin, int64_t end) {
  constexpr int64_t kSums = kTaps * kTaps * kLanes;
  const int64_t height = p.out_height(), width = p.out_width();
  const int64_t x_width = width + kTaps - 1, x_row = x_width * kLanes;
  const int64_t band_height = std::min(height, std::max<int64_t>(kBandFloats / x_row, 1));
  const Buffer x = Buffer::zeros((band_height + kTaps - 1) * x_row);
  const Buffer grad_y(band_height * width * kLanes);
  const Buffer sums = Buffer::zeros(ceil_div(end - begin, kLanes) * kSums);

  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t top = 0; top < height; top += band_height) {
      const int64_t rows = std::min(band_height, height - top);
      float* sum = sums.data();
      for (int64_t c = begin; c < end; c += kLanes, sum += kSums) {
        const int64_t lanes = std::min<int64_t>(kLanes, end - c);
        for (int64_t i = 0; i < rows + kTaps - 1; ++i) {
          const int64_t row = top + i - p.pad_h;
          if (row < 0 || row >= p.height)
            std::fill_n(&x[i * x_row], x_row, 0.0f);
          else
            copy_pixels<kLanes>(p.x + ((image * p.height + row) * p.width) * p.channels + c,
                p.channels, lanes, p.width, &x[i * x_row + p.pad_w * kLanes]);
        }
        copy_pixels<kLanes>(p.grad_y + (image * height + top) * width * p.channels + c, p.channels,
            lanes, rows * width, grad_y.data());
        for (int64_t r = 0; r < kTaps; r += kRows)
          add_taps<kLanes, kTaps, kRows>(
              {x.data(), grad_y.data(), rows, width}, &x[r * x_row], sum + r * kTaps * kLanes);
      }
    }

  for (int64_t c = begin; c < end; ++c)
    for (int64_t tap = 0; tap < kTaps * kTaps; ++tap)
      p.grad_weight[c * kTaps * kTaps + tap] =
          sums[(c - begin) / kLanes * kSums + tap * kLanes + (c - begin) % kLanes];
}

namespace scalar {
template <int kTaps>
void grad_channels(const DepthwiseGrad& p, int64_t begin, int64_t end) {
  grad_channels_body<4, kTaps, tap_rows(kTaps, 16)>(p, begin, end);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
template <int kTaps>
MK_AVX2 void grad_channels(const DepthwiseGrad& p, int64_t begin, int64_t end) {
  grad_channels_body<8, kTaps, tap_rows(kTaps, 16)>(p, begin, end);
}
} // namespace avx2

namespace avx512 {
template <int kTaps>
MK_AVX512 void grad_channels(const DepthwiseGrad& p, int64_t begin, int64_t end) {
  grad_channels_body<16, kTaps, tap_rows(kTaps, 32)>(p, begin, end);
}
} // namespace avx512
#endif

template <int kTaps>
void grad_as(const DepthwiseGrad& p, const Exec& exec) {
  const auto grad_channels = MK_BY_ISA(exec.isa, grad_channels<kTaps>);
  // Threads share channels, so that each sums whole batches and the result is the same for any
  // number of threads.
  exec.parallel.run(0, ceil_div(p.channels, kGroup), 1, [&](int64_t begin, int64_t end) {
    grad_channels(p, begin * kGroup, std::min(end * kGroup, p.channels));
  });
}

} // namespace

void depthwise_grad(const DepthwiseGrad& p, const Exec& exec) {
  switch (p.kernel) {
  case 3:
    return grad_as<3>(p, exec);
  case 5:
    return grad_as<5>(p, exec);
  case 7:
    return grad_as<7>(p, exec);
  case 9:
    return grad_as<9>(p, exec);
  }
}

} // namespace masked_kernels
