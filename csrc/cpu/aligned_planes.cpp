// y = epilogue(x (w . m)^T) of planes: the tables and lookups of aligned_linear for many tokens,
// with nothing to transpose on either side.
#include "aligned_tables.h"
#include "buffer.h"
#include "epilogue.h"
#include "planes.h"

#include <algorithm>

#if MK_X86
namespace masked_kernels {
namespace {

// The outputs of 16 pixels from `pixel` on. `values` has a value for each column, and those that
// fill up a table.
template <int kLanes, int kRows, int64_t kWords>
MK_INLINE void multiply_body(const Planes& planes, const AlignedLinear& p, const float* values,
    int64_t pixel, float* tables, float* sums) {
  constexpr int kPixels = Planes::kVector, kVectors = kPixels / kLanes;
  const int64_t stride = planes.stride(), words = tile_words(p.cols);
  const int64_t blocks = ceil_div(p.rows, kBlockRows);
  for (int64_t word = 0; word < words; word += kWords) {
    const int64_t col = word * kTileColumns,
                  columns = std::min(kWords * kTileColumns, p.cols - col);
    const int64_t left = columns % kTableColumns, whole = columns - left;
    const float* x = p.x + col * stride + pixel;
    add_up_subsets<kLanes, kVectors>(x, stride, values + col, whole, tables);
    if (left > 0) {
      alignas(64) float padded[kTableColumns * kPixels] = {};
      for (int64_t k = 0; k < left; ++k)
        std::copy_n(x + (whole + k) * stride, kPixels, padded + k * kPixels);
      add_up_subsets<kLanes, kVectors>(padded, kPixels, values + col + whole, kTableColumns,
          tables + whole / kTableColumns * kSubsets * kPixels);
    }
    for (int64_t block = 0; block < blocks; ++block)
      add_looked_up_body<kLanes, kVectors, kRows>(p.tiles + (block * words + word) * kBlockRows,
          words * kBlockRows, columns, tables, word == 0, sums + block * kBlockRows * kPixels);
  }
  for (int64_t row = 0; row < p.rows; row += 2) // a number of planes.kSquare
    for (int64_t i = 0; i < kPixels; i += kLanes) {
      const Finish<kLanes> finishes[] = {{p.epilogue, row}, {p.epilogue, row + 1}};
      Floats<kLanes> v[] = {
          load<kLanes>(sums + row * kPixels + i), load<kLanes>(sums + (row + 1) * kPixels + i)};
      const int64_t at = row * stride + pixel + i;
      Finish<kLanes>::each(finishes, v, at, stride);
      store<kLanes>(p.y + at, v[0]);
      store<kLanes>(p.y + at + stride, v[1]);
    }
}

namespace avx2 {
constexpr int64_t kWords = kManyWords / 2;

MK_AVX2 void multiply(const Planes& planes, const AlignedLinear& p, const float* values,
    int64_t pixel, float* tables, float* sums) {
  multiply_body<8, 4, kWords>(planes, p, values, pixel, tables, sums);
}
} // namespace avx2

namespace avx512 {
constexpr int64_t kWords = kManyWords;

MK_AVX512 void multiply(const Planes& planes, const AlignedLinear& p, const float* values,
    int64_t pixel, float* tables, float* sums) {
  multiply_body<16, kBlockRows, kWords>(planes, p, values, pixel, tables, sums);
}
} // namespace avx512

} // namespace

bool has_planes(const AlignedLinear& p) {
  return p.rows == p.cols && p.patterns == 1 && !p.patches;
}

void aligned_planes(const Planes& planes, const AlignedLinear& p, const Exec& exec) {
  const auto multiply = exec.isa == Isa::avx512 ? avx512::multiply : avx2::multiply;
  const int64_t words = exec.isa == Isa::avx512 ? avx512::kWords : avx2::kWords;
  std::vector<float> values(ceil_div(p.cols, kTableColumns) * kTableColumns);
  repeat_values(p.values, p.period, p.cols, values.data());
  const int64_t rows = ceil_div(p.rows, kBlockRows) * kBlockRows;
  constexpr int64_t kGrain = 1 << 18; // products worth waking a thread for
  exec.parallel.run(0, planes.pixels() / Planes::kVector,
      ceil_div(kGrain, Planes::kVector * rows * p.cols + 1), [&](int64_t begin, int64_t end) {
        const Buffer tables(words * kTableFloats * Planes::kVector), sums(rows * Planes::kVector);
        for (int64_t i = begin; i < end; ++i)
          multiply(planes, p, values.data(), i * Planes::kVector, tables.data(), sums.data());
      });
}

} // namespace masked_kernels
#endif
