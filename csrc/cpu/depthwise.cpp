// y = epilogue(depthwise convolution of x with w . m), stride 1, pixels of adjacent channels
// (channels_last).
//
// A vector holds one pixel of some channels. Those channels of a band of rows are copied once, with
// the zeros around them, so that nothing asks where the image ends and pixels a power of two apart
// do not fight over the same cache sets. Then each is loaded once a kernel row for all the outputs
// in registers that it adds to. Meanwhile x and y of the next band are fetched, a few lines at a
// time: they come in an order that the hardware does not foresee.
#include "buffer.h"
#include "epilogue.h"
#include "prefetch.h"

#include <algorithm>

namespace masked_kernels {
namespace {

constexpr int64_t kGroup = 16;           // channels that a thread takes at once
constexpr int64_t kColumns = 8;          // outputs in registers
constexpr int64_t kBandFloats = 1 << 16; // of a band of x, all channels, a part of the L2 cache

// Output rows of one image.
struct Band {
  int64_t image, row_begin, row_end;

  int64_t rows() const { return row_end - row_begin; }
};

// What a thread does at once: the outputs of a band for the channels [channel, channel + kGroup).
struct Task {
  Band band;
  int64_t channel;
  const float* filters; // of load_filters
  float* copied;
  Ahead x, y; // what the next tasks need
};

int64_t copied_width(const DepthwiseConv2d& p) {
  return ceil_div(p.out_width(), kColumns) * kColumns + p.kernel_w - 1;
}

// sums [kColumns, lanes] = outputs of one row, from the column that `x` [rows, copied_width, lanes]
// begins with. kWidth is the width of the kernel, or 0 for any.
template <int kLanes, int kWidth, int kColumns>
MK_INLINE void convolve_columns(
    const DepthwiseConv2d& p, const float* filter, const float* x, float* sums) {
  const int64_t width = kWidth > 0 ? kWidth : p.kernel_w;
  const int64_t skipped = (copied_width(p) - width) * kLanes;
  Floats<kLanes> sum[kColumns] = {};
  for (int64_t i = 0; i < p.kernel_h; ++i, x += skipped)
#pragma GCC unroll 16
    for (int64_t j = 0; j < width; ++j, x += kLanes, filter += kLanes) {
      asm("" : "+r"(x)); // GCC would keep pixels for later columns, and spills
      const auto w = load<kLanes>(filter);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        sum[c] += load<kLanes>(x + c * kLanes) * w;
    }
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c)
    store<kLanes>(sums + c * kLanes, sum[c]);
}

// copied [slices, rows, copied_width, lanes] = the input rows of a task, zeros where there is no
// input. All slices of a pixel are read together: they are one cache line.
template <int kLanes>
MK_INLINE void copy_rows(const DepthwiseConv2d& p, const Task& task, int64_t slice) {
  constexpr int64_t kSlices = kGroup / kLanes;
  const int64_t width = copied_width(p), row_floats = p.width * p.channels;
  const int64_t channels = std::min(kGroup, p.channels - task.channel);
  const float* image = p.x + task.band.image * p.height * row_floats + task.channel;
  float* to = task.copied;
  for (int64_t i = 0; i < task.band.rows() + p.kernel_h - 1; ++i, to += width * kLanes) {
    const int64_t row = task.band.row_begin + i - p.pad_h;
    const bool inside = 0 <= row && row < p.height;
    const int64_t begin = inside ? p.pad_w : width, end = inside ? begin + p.width : width;
    for (int64_t s = 0; s < kSlices; ++s) {
      std::fill(to + s * slice, to + s * slice + begin * kLanes, 0.0f);
      std::fill(to + s * slice + end * kLanes, to + s * slice + width * kLanes, 0.0f);
    }
    const float* from = image + row * row_floats;
    for (int64_t column = begin; column < end; ++column, from += p.channels)
#pragma GCC unroll 4
      for (int64_t s = 0; s < kSlices; ++s)
        if (const int64_t first = s * kLanes; first < channels)
          store<kLanes>(
              to + s * slice + column * kLanes, load<kLanes>(from + first, channels - first));
  }
}

// filters [channels / lanes, taps, lanes] of the channels [channel, channel + kGroup)
template <int kLanes>
MK_INLINE void load_filters(const DepthwiseConv2d& p, int64_t channel, float* filters) {
  const int64_t taps = p.kernel_h * p.kernel_w, words = words_per_row(taps);
  int64_t next = channel * taps % p.period;
  for (int64_t c = 0; c < std::min(kGroup, p.channels - channel); ++c) {
    float* out = filters + c / kLanes * taps * kLanes + c % kLanes;
    int64_t count; // of taps in one word and one period
    for (int64_t tap = 0; tap < taps; tap += count, out += count * kLanes) {
      count = std::min({taps - tap, kWordBits - tap % kWordBits, p.period - next});
      const uint32_t word = p.words[(channel + c) * words + tap / kWordBits] >> tap % kWordBits;
      float kept[kWordBits]; // first, so that the compiler uses vectors
      for (int64_t i = 0; i < count; ++i) {
        const float value = p.values[next + i];
        kept[i] = word >> i & 1 ? value : 0.0f;
      }
      for (int64_t i = 0; i < count; ++i)
        out[i * kLanes] = kept[i];
      next = next + count == p.period ? 0 : next + count;
    }
  }
}

template <int kLanes, int kWidth>
MK_INLINE void convolve_body(const DepthwiseConv2d& p, const Task& task) {
  const Band& band = task.band;
  const int64_t taps = p.kernel_h * p.kernel_w, width = copied_width(p);
  const int64_t slice = (band.rows() + p.kernel_h - 1) * width * kLanes;
  const int64_t end = std::min(task.channel + kGroup, p.channels);
  copy_rows<kLanes>(p, task, slice);
  float* const y = p.y;
  Ahead x_ahead = task.x, y_ahead = task.y;
  const int64_t strips = band.rows() * ceil_div(p.out_width(), kColumns);
  const int64_t x_lines = ceil_div(x_ahead.lines(), strips);
  const int64_t y_lines = ceil_div(y_ahead.lines(), strips);
  for (int64_t row = band.row_begin; row < band.row_end; ++row)
    for (int64_t column = 0; column < p.out_width(); column += kColumns) {
      x_ahead.take(x_lines).fetch();
      y_ahead.take(y_lines).fetch();
      const float* x = task.copied + ((row - band.row_begin) * width + column) * kLanes;
      const float* filters = task.filters;
      const int64_t count = std::min(kColumns, p.out_width() - column);
      const int64_t pixel = (band.image * p.out_height() + row) * p.out_width() + column;
      for (int64_t channel = task.channel; channel < end; channel += kLanes) {
        alignas(64) float sums[kColumns * kLanes];
        if (count > kColumns / 2)
          convolve_columns<kLanes, kWidth, kColumns>(p, filters, x, sums);
        else
          convolve_columns<kLanes, kWidth, kColumns / 2>(p, filters, x, sums);
        const int64_t at = pixel * p.channels + channel;
        Outputs<kLanes>{sums, kLanes, count, p.channels - channel, y + at, p.channels}.finish(
            p.epilogue, channel, at, p.channels);
        x += slice, filters += taps * kLanes;
      }
    }
}

namespace scalar {
template <int kWidth>
void convolve(const DepthwiseConv2d& p, const Task& task) {
  convolve_body<4, kWidth>(p, task);
}
void load_filters(const DepthwiseConv2d& p, int64_t channel, float* filters) {
  masked_kernels::load_filters<4>(p, channel, filters);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
template <int kWidth>
MK_AVX2 void convolve(const DepthwiseConv2d& p, const Task& task) {
  convolve_body<8, kWidth>(p, task);
}
MK_AVX2 void load_filters(const DepthwiseConv2d& p, int64_t channel, float* filters) {
  masked_kernels::load_filters<8>(p, channel, filters);
}
} // namespace avx2

namespace avx512 {
template <int kWidth>
MK_AVX512 void convolve(const DepthwiseConv2d& p, const Task& task) {
  convolve_body<16, kWidth>(p, task);
}
MK_AVX512 void load_filters(const DepthwiseConv2d& p, int64_t channel, float* filters) {
  masked_kernels::load_filters<16>(p, channel, filters);
}
} // namespace avx512
#endif

// A share of the images or rows of them that a band reads or writes.
Ahead share_of(const Band& band, const float* images, int64_t height, int64_t row_floats,
    int64_t part, int64_t parts) {
  const float* image = images + band.image * height * row_floats;
  return Ahead{image + std::min(band.row_begin, height) * row_floats,
      image + std::min(band.row_end, height) * row_floats}
      .share(part, parts);
}

// Rows of a band. What a task reads is copied before it writes; then bands of all rows can be in
// place.
int64_t band_rows_of(const DepthwiseConv2d& p) {
  const int64_t row = std::max(copied_width(p) * kGroup, p.width * p.channels);
  return std::min(std::max(kBandFloats / row, p.kernel_h), p.out_height());
}

template <int kWidth>
void convolve_as(const DepthwiseConv2d& p, const Exec& exec) {
  const auto convolve = MK_BY_ISA(exec.isa, convolve<kWidth>);
  const auto load_filters = MK_BY_ISA(exec.isa, load_filters);
  const int64_t copied_row = copied_width(p) * kGroup, band_rows = band_rows_of(p);
  const int64_t bands = ceil_div(p.out_height(), band_rows);
  const int64_t taps = p.kernel_h * p.kernel_w, groups = ceil_div(p.channels, kGroup);
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for

  const auto band_of = [&](int64_t i) {
    const int64_t row = i % bands * band_rows;
    return Band{i / bands, row, std::min(row + band_rows, p.out_height())};
  };
  // Groups of one image come one after another: they share its cache lines and pages.
  exec.parallel.run(0, p.batch * bands * groups,
      ceil_div(kGrain, band_rows * p.out_width() * kGroup * taps), [&](int64_t begin, int64_t end) {
        const int64_t owned = std::min(end - begin, groups), filter_floats = taps * kGroup;
        const Buffer filters = Buffer::zeros(owned * filter_floats); // there may be fewer channels
        const Buffer copied((band_rows + p.kernel_h - 1) * copied_row);
        for (int64_t i = 0; i < owned; ++i)
          load_filters(p, (begin + i) % groups * kGroup, &filters[i * filter_floats]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t group = i % groups;
          Task task{band_of(i / groups), group * kGroup,
              &filters[(i - begin) % groups * filter_floats], copied.data(), {}, {}};
          if (const int64_t next = i / groups + 1; next * groups < end) {
            const Band band = band_of(next);
            task.x = share_of(band, p.x, p.height, p.width * p.channels, group, groups);
            task.y = share_of(band, p.y, p.out_height(), p.out_width() * p.channels, group, groups);
          }
          convolve(p, task);
        }
      });
}

} // namespace

bool can_be_in_place(const DepthwiseConv2d& p, const Exec&) {
  return p.out_height() == p.height && p.out_width() == p.width && band_rows_of(p) == p.height;
}

void depthwise_conv2d(const DepthwiseConv2d& p, const Exec& exec) {
  if (p.batch * p.out_height() * p.out_width() * p.channels == 0)
    return;
  switch (p.kernel_w) {
  case 3:
    return convolve_as<3>(p, exec);
  case 5:
    return convolve_as<5>(p, exec);
  case 7:
    return convolve_as<7>(p, exec);
  case 9:
    return convolve_as<9>(p, exec);
  default:
    return convolve_as<0>(p, exec);
  }
}

} // namespace masked_kernels
