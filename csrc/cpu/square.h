// The transpose of eight by eight floats, or of any elements as wide, in registers.
#pragma once

#include "target.h"

#include <algorithm>
#include <cstdint>

#if MK_X86
namespace masked_kernels {

// out [8, 8] = the transpose of from [8, 8], rows so many elements apart.
MK_AVX2 MK_INLINE void transpose_square(
    const float* from, int64_t from_stride, float* out, int64_t out_stride) {
  __m256 row[8], pair[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    row[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  // Elements 4 h + c of four rows in half h of quad[c], first of rows 0 to 3, then of rows 4 to 7.
  __m256 quad[2][4];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256* p = pair + 4 * i;
    quad[i][0] = _mm256_shuffle_ps(p[0], p[2], _MM_SHUFFLE(1, 0, 1, 0));
    quad[i][1] = _mm256_shuffle_ps(p[0], p[2], _MM_SHUFFLE(3, 2, 3, 2));
    quad[i][2] = _mm256_shuffle_ps(p[1], p[3], _MM_SHUFFLE(1, 0, 1, 0));
    quad[i][3] = _mm256_shuffle_ps(p[1], p[3], _MM_SHUFFLE(3, 2, 3, 2));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * out_stride, _mm256_permute2f128_ps(quad[0][c], quad[1][c], 0x20));
    _mm256_storeu_ps(
        out + (c + 4) * out_stride, _mm256_permute2f128_ps(quad[0][c], quad[1][c], 0x31));
  }
}

// out [cols, rows] = the transpose of from [rows, cols], its rows `stride` elements apart. Rows are
// a multiple of 8, columns 8 or more.
MK_AVX2 inline void transpose_squares(
    const float* from, int64_t stride, int64_t rows, int64_t cols, float* out) {
  constexpr int64_t kSquare = 8;
  for (int64_t row = 0; row < rows; row += kSquare)
    for (int64_t k = 0; k < cols; k += kSquare) {
      const int64_t col = std::min(k, cols - kSquare); // the last square overlaps
      transpose_square(from + row * stride + col, stride, out + col * rows + row, rows);
    }
}

} // namespace masked_kernels
#endif
