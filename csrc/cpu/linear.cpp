// y [M, N] = scale * x [M, K] (w . m)^T + bias, straight from bits and values.
//
// A micro-kernel multiplies a group of weight rows with a few tokens and keeps all sums in
// registers. K is cut into blocks whose part of x stays in the L1 cache while all rows pass by.
#include "row_walk.h"
#include "row_windows.h"
#include "target.h"

#include "masked_kernels/kernels.h"

namespace masked_kernels {
namespace {

constexpr int kMaxRows = 8, kMaxTokens = 8;

// Part of a group of rows: some columns, from a word boundary on.
struct Rows {
  const float* values[kMaxRows];
  const uint32_t* words[kMaxRows];
};

struct Tokens {
  const float* x;
  int64_t stride;
};

// sums[r * tokens + t] = sum over `count` columns of x[t] * (row r)
using MicroKernel = void (*)(
    const Rows& rows, const Rows& next, Tokens tokens, int64_t count, float* sums);

struct MicroKernels {
  int rows;      // in a group
  int tokens;    // most tokens at once
  int64_t cache; // elements of x to keep in the L1 cache
  MicroKernel by_tokens[kMaxTokens];
};

namespace scalar {

template <int kTokens>
void micro_kernel(const Rows& rows, const Rows&, Tokens tokens, int64_t count, float* sums) {
  std::fill_n(sums, kTokens, 0.0f);
  for (int64_t k = 0; k < count; ++k) {
    if (!(rows.words[0][k / kWordBits] >> k % kWordBits & 1))
      continue;
    for (int t = 0; t < kTokens; ++t)
      sums[t] += tokens.x[t * tokens.stride + k] * rows.values[0][k];
  }
}

constexpr MicroKernels kKernels = {
    1, 4, 8192, {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>, micro_kernel<4>}};

} // namespace scalar

#if MK_X86
namespace avx2 {
using scalar::kKernels;
}

namespace avx512 {

constexpr int64_t kLanes = 16;
constexpr int64_t kLineBits = 512; // the bits of a cache line

template <int kRows, int kTokens>
struct Sums {
  __m512 at[kRows][kTokens];
};

// Adds 16 columns; `lanes` excludes those past the end. Values whose bit is 0 take no part, not
// even as a product with zero.
template <int kRows, int kTokens>
MK_AVX512 MK_INLINE void add_columns(
    const Rows& rows, Tokens tokens, int64_t k, __mmask16 lanes, Sums<kRows, kTokens>& sums) {
  __m512 x[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
    x[t] = _mm512_maskz_loadu_ps(lanes, tokens.x + t * tokens.stride + k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const auto* bits = reinterpret_cast<const __mmask16*>(rows.words[r]) + k / kLanes;
    const __mmask16 set = _load_mask16(const_cast<__mmask16*>(bits)) & lanes;
    const __m512 w = _mm512_maskz_loadu_ps(lanes, rows.values[r] + k);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums.at[r][t] = _mm512_mask3_fmadd_ps(w, x[t], sums.at[r][t], set);
  }
}

template <int kRows, int kTokens>
MK_AVX512 void micro_kernel(
    const Rows& rows, const Rows& next, Tokens tokens, int64_t count, float* sums) {
  Sums<kRows, kTokens> acc;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      acc.at[r][t] = _mm512_setzero_ps();

  int64_t k = 0;
  for (const int64_t whole = count / kLanes * kLanes; k < whole;) {
    // The walk leaps over rows, which no hardware prefetcher foresees.
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(next.words[r]) + k / 8, _MM_HINT_T0);
    for (const int64_t line_end = std::min(k + kLineBits, whole); k < line_end; k += kLanes)
      add_columns(rows, tokens, k, 0xffff, acc);
  }
  if (k < count)
    add_columns(rows, tokens, k, static_cast<__mmask16>(low_bits(count - k)), acc);

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums[r * kTokens + t] = _mm512_reduce_add_ps(acc.at[r][t]);
}

constexpr int kRows = 4;
constexpr MicroKernels kKernels = {kRows, 6, 6144,
    {micro_kernel<kRows, 1>, micro_kernel<kRows, 2>, micro_kernel<kRows, 3>, micro_kernel<kRows, 4>,
        micro_kernel<kRows, 5>, micro_kernel<kRows, 6>}};

} // namespace avx512
#endif

// Up to kernels.rows rows of a walk. A shorter group repeats its last row and ignores those sums.
struct Group {
  Rows rows;
  int64_t row[kMaxRows];
  int count = 0;
};

Group next_group(RowWalk& walk, int size, const RowWindows<float>& windows, const MaskedLinear& p) {
  Group group;
  for (; group.count < size && !walk.done(); walk.advance(), ++group.count) {
    group.row[group.count] = walk.row();
    group.rows.values[group.count] = windows.at(walk.start());
    group.rows.words[group.count] = p.words + walk.row() * words_per_row(p.cols);
  }
  for (int i = group.count; i > 0 && i < size; ++i) {
    group.rows.values[i] = group.rows.values[i - 1];
    group.rows.words[i] = group.rows.words[i - 1];
  }
  return group;
}

Rows from_column(Rows rows, int size, int64_t col) {
  for (int r = 0; r < size; ++r) {
    rows.values[r] += col;
    rows.words[r] += col / kWordBits;
  }
  return rows;
}

struct Tile {
  int64_t row_begin, row_end, token_begin, token_end;
};

void multiply_tile(const MaskedLinear& p, const RowWindows<float>& windows,
    const MicroKernels& kernels, const Tile& tile) {
  const int64_t tokens = tile.token_end - tile.token_begin;
  const int64_t token_blocks = ceil_div(tokens, kernels.tokens);
  const int64_t widest = ceil_div(tokens, token_blocks);
  const int64_t block = std::max<int64_t>(kernels.cache / widest / 512 * 512, 512);
  for (int64_t col = 0; col < p.cols; col += block) {
    const int64_t cols = std::min(block, p.cols - col);
    for (int64_t i = 0; i < token_blocks; ++i) {
      const int64_t token = tile.token_begin + tokens * i / token_blocks;
      const int64_t width = tile.token_begin + tokens * (i + 1) / token_blocks - token;
      const MicroKernel kernel = kernels.by_tokens[width - 1];
      RowWalk walk(tile.row_begin, tile.row_end, p.cols, p.period);
      Group group = next_group(walk, kernels.rows, windows, p);
      while (group.count > 0) {
        const Group next = next_group(walk, kernels.rows, windows, p);
        float sums[kMaxRows * kMaxTokens];
        kernel(from_column(group.rows, kernels.rows, col),
            from_column(next.count ? next.rows : group.rows, kernels.rows, col),
            {p.x + token * p.cols + col, p.cols}, cols, sums);
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
  const MicroKernels& kernels = MK_BY_ISA(exec.isa, kKernels);

  // Threads share rows, or tokens when there are too few rows.
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  const int64_t groups = ceil_div(p.rows, kernels.rows);
  const bool by_rows = groups >= 4 * exec.parallel.threads() || groups >= p.tokens;
  const int64_t units = by_rows ? groups : p.tokens;
  const int64_t grain = ceil_div(kGrain * units, p.tokens * p.rows * p.cols);
  exec.parallel.run(0, units, grain, [&](int64_t begin, int64_t end) {
    const Tile tile =
        by_rows ? Tile{begin * kernels.rows, std::min(end * kernels.rows, p.rows), 0, p.tokens}
                : Tile{0, p.rows, begin, end};
    multiply_tile(p, windows, kernels, tile);
  });
}

} // namespace masked_kernels
