// y [M, N] = scale * x [M, K] (w . m)^T + bias, straight from bits and values.
//
// A micro-kernel multiplies a group of weight rows with a few tokens and keeps all sums in
// registers. K is cut into blocks; a block of x is packed once, into the L1 cache, and all rows
// pass by it.
#include "buffer.h"
#include "row_walk.h"
#include "row_windows.h"
#include "target.h"

#include "masked_kernels/kernels.h"

#include <cstring>
#include <numeric>

namespace masked_kernels {
namespace {

constexpr int kMaxRows = 6, kMaxTokens = 6;
constexpr int64_t kLanes = 16;
constexpr int64_t kLineBits = 512; // the bits in a cache line

// Part of a group of rows: some columns, from a word boundary on.
struct Rows {
  const float* values[kMaxRows];
  const uint32_t* words[kMaxRows];
};

// sums[r * tokens + t] = sum over `count` columns of x[t] * (row r). x is packed in vectors of 16
// columns [ceil(count / 16), tokens, 16], 0 past the end.
using MicroKernel = void (*)(const Rows& rows, const float* x, int64_t count, float* sums);

struct Variant {
  int rows; // in a group
  MicroKernel kernel;
};

struct Kernels {
  int tokens; // most at once
  Variant by_tokens[kMaxTokens];
};

namespace scalar {

template <int kTokens>
void micro_kernel(const Rows& rows, const float* x, int64_t count, float* sums) {
  float acc[kTokens][kLanes] = {};
  for (int64_t k = 0; k < count; k += kLanes, x += kTokens * kLanes) {
    const uint32_t bits = rows.words[0][k / kWordBits] >> k % kWordBits;
    const int64_t lanes = std::min(kLanes, count - k);
    float w[kLanes] = {};
    for (int64_t j = 0; j < lanes; ++j)
      w[j] = bits >> j & 1 ? rows.values[0][k + j] : 0.0f;
    for (int t = 0; t < kTokens; ++t)
      for (int64_t j = 0; j < kLanes; ++j)
        acc[t][j] += x[t * kLanes + j] * w[j];
  }
  for (int t = 0; t < kTokens; ++t)
    sums[t] = std::accumulate(acc[t], acc[t] + kLanes, 0.0f);
}

constexpr Kernels kKernels = {
    4, {{1, micro_kernel<1>}, {1, micro_kernel<2>}, {1, micro_kernel<3>}, {1, micro_kernel<4>}}};

} // namespace scalar

#if MK_X86
namespace avx2 {

constexpr int kHalf = kLanes / 2; // of a vector of x, what a register holds

template <int kRows, int kTokens>
struct Sums {
  __m256 at[kRows][kTokens];
};

// Adds the first kHalves * kHalf of the 32 columns from k on; their words are in every lane of each
// row's `words`. With kPartial, values whose bit is not set are not read.
template <int kHalves, bool kPartial, int kRows, int kTokens>
MK_AVX2 MK_INLINE void add_columns(const Rows& rows, const __m256i (&words)[kRows], const float* x,
    int64_t k, Sums<kRows, kTokens>& sums) {
  const __m256i first_to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
#pragma GCC unroll 4
  for (int half = 0; half < kHalves; ++half) {
    const __m256i to_sign = _mm256_sub_epi32(first_to_sign, _mm256_set1_epi32(half * kHalf));
    __m256 w[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i signs = _mm256_sllv_epi32(words[r], to_sign);
      const float* values = rows.values[r] + k + half * kHalf;
      w[r] = kPartial ? _mm256_maskload_ps(values, signs)
                      : _mm256_and_ps(_mm256_castsi256_ps(_mm256_srai_epi32(signs, 31)),
                            _mm256_loadu_ps(values));
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m256 xs = _mm256_loadu_ps(x + (half / 2 * kTokens + t) * kLanes + half % 2 * kHalf);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        sums.at[r][t] = _mm256_fmadd_ps(w[r], xs, sums.at[r][t]);
    }
  }
}

template <int kRows, int kTokens>
MK_AVX2 void micro_kernel(const Rows& rows, const float* x, int64_t count, float* sums) {
  Sums<kRows, kTokens> acc;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      acc.at[r][t] = _mm256_setzero_ps();

  __m256i words[kRows];
  const auto load_words = [&](int64_t k, uint32_t columns) MK_AVX2 {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      words[r] = _mm256_set1_epi32(static_cast<int>(rows.words[r][k / kWordBits] & columns));
  };
  int64_t k = 0;
  for (; k + kWordBits <= count; k += kWordBits, x += 2 * kTokens * kLanes) {
    load_words(k, ~0u);
    add_columns<4, false>(rows, words, x, k, acc);
  }
  if (k < count) {
    load_words(k, low_bits(count - k));
    if (count - k > kLanes) // x ends with a whole vector
      add_columns<4, true>(rows, words, x, k, acc);
    else
      add_columns<2, true>(rows, words, x, k, acc);
  }

  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      float lanes[kHalf];
      _mm256_storeu_ps(lanes, acc.at[r][t]);
      sums[r * kTokens + t] = std::accumulate(lanes, lanes + kHalf, 0.0f);
    }
  }
}

constexpr Kernels kKernels = {
    6, {{4, micro_kernel<4, 1>}, {4, micro_kernel<4, 2>}, {3, micro_kernel<3, 3>},
           {2, micro_kernel<2, 4>}, {2, micro_kernel<2, 5>}, {2, micro_kernel<2, 6>}}};

} // namespace avx2

namespace avx512 {

template <int kRows, int kTokens>
struct Sums {
  __m512 at[kRows][kTokens];
};

// Adds the 16 columns from k on, less those past the end, where x is 0. The bits of these columns
// begin at bit `shift` of each row's `bits`.
template <int kRows, int kTokens>
MK_AVX512 MK_INLINE void add_columns(const Rows& rows, const uint64_t (&bits)[kRows], int64_t shift,
    const float* x, int64_t k, __mmask16 lanes, Sums<kRows, kTokens>& sums) {
  __m512 xs[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
    xs[t] = _mm512_load_ps(x + k * kTokens + t * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __mmask16 set = _cvtu32_mask16(static_cast<uint32_t>(bits[r] >> shift));
    __m512 w = _mm512_maskz_loadu_ps(lanes, rows.values[r] + k);
    asm("" : "+v"(w)); // one load for all tokens: most cross a cache line
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums.at[r][t] = _mm512_mask3_fmadd_ps(w, xs[t], sums.at[r][t], set);
  }
}

// Loads across cache lines take every slot the load ports have, so bits are loaded 64 at a time.
template <int kRows, int kTokens>
MK_AVX512 void micro_kernel(const Rows& rows, const float* x, int64_t count, float* sums) {
  constexpr int64_t kChunk = 64;
  Sums<kRows, kTokens> acc;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      acc.at[r][t] = _mm512_setzero_ps();

  uint64_t bits[kRows];
  int64_t k = 0;
  for (const int64_t whole = count / kChunk * kChunk; k < whole; k += kChunk) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      std::memcpy(&bits[r], rows.words[r] + k / kWordBits, sizeof bits[r]);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChunk; i += kLanes)
      add_columns(rows, bits, i, x, k + i, 0xffff, acc);
  }
  for (; k < count; k += kLanes) {
    for (int r = 0; r < kRows; ++r)
      bits[r] = rows.words[r][k / kWordBits];
    add_columns(rows, bits, k % kWordBits, x, k, static_cast<__mmask16>(low_bits(count - k)), acc);
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums[r * kTokens + t] = _mm512_reduce_add_ps(acc.at[r][t]);
}

constexpr Kernels kKernels = {
    6, {{4, micro_kernel<4, 1>}, {5, micro_kernel<5, 2>}, {5, micro_kernel<5, 3>},
           {5, micro_kernel<5, 4>}, {4, micro_kernel<4, 5>}, {4, micro_kernel<4, 6>}}};
} // namespace avx512
#endif

// Up to `size` rows of a walk. A shorter group repeats its last row; those sums are not used.
struct Group {
  Rows rows;
  int64_t row[kMaxRows];
  int count = 0;
};

Group next_group(
    RowWalk& walk, int size, const RowWindows<float>& windows, const MaskedLinear& p, int64_t col) {
  Group group;
  for (; group.count < size && !walk.done(); walk.advance(), ++group.count) {
    group.row[group.count] = walk.row();
    group.rows.values[group.count] = windows.at(walk.start()) + col;
    group.rows.words[group.count] = p.words + walk.row() * words_per_row(p.cols) + col / kWordBits;
  }
  for (int i = group.count; i > 0 && i < size; ++i) {
    group.rows.values[i] = group.rows.values[i - 1];
    group.rows.words[i] = group.rows.words[i - 1];
  }
  return group;
}

// A walk leaps over rows, which no hardware prefetcher foresees.
void prefetch(const Rows& rows, int count, int64_t cols) {
  for (int r = 0; r < count; ++r)
    for (int64_t k = 0; k < cols; k += kLineBits)
      __builtin_prefetch(rows.words[r] + k / kWordBits);
}

void pack_tokens(const float* x, int64_t stride, int64_t tokens, int64_t count, float* packed) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const int64_t lanes = std::min(kLanes, count - k);
    for (int64_t t = 0; t < tokens; ++t, packed += kLanes) {
      std::copy_n(x + t * stride + k, lanes, packed);
      std::fill(packed + lanes, packed + kLanes, 0.0f);
    }
  }
}

struct Tile {
  int64_t row_begin, row_end, token_begin, token_end;
};

void multiply_tile(const MaskedLinear& p, const RowWindows<float>& windows, const Kernels& kernels,
    const Tile& tile) {
  constexpr int64_t kCached = 12288; // elements of x to keep in the L1 cache
  const Buffer packed(kCached);
  float* x = packed.data();

  const int64_t tokens = tile.token_end - tile.token_begin;
  const int64_t token_blocks = ceil_div(tokens, kernels.tokens);
  const int64_t block = kCached / ceil_div(tokens, token_blocks) / kLineBits * kLineBits;
  for (int64_t col = 0; col < p.cols; col += block) {
    const int64_t cols = std::min(block, p.cols - col);
    for (int64_t i = 0; i < token_blocks; ++i) {
      const int64_t token = tile.token_begin + tokens * i / token_blocks;
      const int64_t width = tile.token_begin + tokens * (i + 1) / token_blocks - token;
      pack_tokens(p.x + token * p.cols + col, p.cols, width, cols, x);
      const Variant& variant = kernels.by_tokens[width - 1];
      RowWalk walk(tile.row_begin, tile.row_end, p.cols, p.period);
      Group group = next_group(walk, variant.rows, windows, p, col);
      while (group.count > 0) {
        const Group next = next_group(walk, variant.rows, windows, p, col);
        float sums[kMaxRows * kMaxTokens];
        prefetch(next.rows, next.count, cols);
        variant.kernel(group.rows, x, cols, sums);
        for (int r = 0; r < group.count; ++r) {
          const int64_t row = group.row[r];
          for (int64_t t = 0; t < width; ++t) {
            float& y = p.y[(token + t) * p.rows + row];
            y = p.scale * sums[r * width + t] + (col > 0 ? y : p.bias ? p.bias[row] : 0.0f);
          }
        }
        group = next;
      }
    }
  }
}

} // namespace

void masked_linear(const MaskedLinear& p, const Exec& exec) {
  if (p.cols == 0) {
    for (int64_t i = 0; i < p.tokens * p.rows; ++i)
      p.y[i] = p.bias ? p.bias[i % p.rows] : 0.0f;
    return;
  }
  if (p.tokens == 0 || p.rows == 0)
    return;
  const RowWindows<float> windows(p.values, p.period, p.rows, p.cols);
  const Kernels& kernels = MK_BY_ISA(exec.isa, kKernels);

  // Threads share rows, or tokens when there are too few rows.
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  const bool by_rows = p.rows >= 16 * exec.parallel.threads() || p.rows >= p.tokens;
  const int64_t units = by_rows ? p.rows : p.tokens;
  const int64_t unit = by_rows ? p.tokens * p.cols : p.rows * p.cols;
  exec.parallel.run(0, units, ceil_div(kGrain, unit), [&](int64_t begin, int64_t end) {
    const Tile tile = by_rows ? Tile{begin, end, 0, p.tokens} : Tile{0, p.rows, begin, end};
    multiply_tile(p, windows, kernels, tile);
  });
}

} // namespace masked_kernels
