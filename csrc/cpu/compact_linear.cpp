// y [M, N] = scale * x [M, K] (w . m)^T + bias from the kept weights alone: half the bytes of a
// dense layer at half density. The bits say where each of them belongs.
#include "spread.h"
#include "vector.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace masked_kernels {
namespace {

constexpr int kRows = 4, kMaxTokens = 6;
constexpr int64_t kLanes = 16;

struct Rows {
  const float* kept[kRows];
  const float* kept_end; // of all rows
  const uint32_t* words[kRows];
};

// sums [kRows, tokens] = products of `cols` columns of x [tokens, cols]
using MicroKernel = void (*)(const Rows& rows, const float* x, int64_t cols, float* sums);

struct Kernels {
  MicroKernel by_tokens[kMaxTokens];
};

namespace scalar {

template <int kTokens>
void micro_kernel(const Rows& rows, const float* x, int64_t cols, float* sums) {
  for (int r = 0; r < kRows; ++r) {
    float acc[kTokens][kLanes] = {};
    const float* kept = rows.kept[r];
    for (int64_t k = 0; k < cols; ++k)
      if (rows.words[r][k / kWordBits] >> k % kWordBits & 1) {
        for (int t = 0; t < kTokens; ++t)
          acc[t][k % kLanes] += *kept * x[t * cols + k];
        ++kept;
      }
    for (int t = 0; t < kTokens; ++t)
      sums[r * kTokens + t] = std::accumulate(acc[t], acc[t] + kLanes, 0.0f);
  }
}

constexpr Kernels kKernels = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>, micro_kernel<4>,
    micro_kernel<5>, micro_kernel<6>};

} // namespace scalar

#if MK_X86
namespace avx2 {

// The sums of some of the rows, in registers.
template <int kAtOnce, int kTokens>
struct Sums {
  __m256 at[kAtOnce][kTokens];
};

// Adds eight columns, of which `lanes` exist; `bits` are those of each row.
template <bool kNearEnd, int kAtOnce, int kTokens>
MK_AVX2 MK_INLINE void add_columns(const float* (&next)[kAtOnce], const float* end,
    const uint32_t (&bits)[kAtOnce], const float* x, int64_t cols, int64_t lanes,
    Sums<kAtOnce, kTokens>& sums) {
  Floats<kSpread> xs[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
    xs[t] = load<kSpread>(x + t * cols, lanes);
#pragma GCC unroll 8
  for (int r = 0; r < kAtOnce; ++r) {
    const __m256 w = spread<kNearEnd>(next[r], end, static_cast<uint8_t>(bits[r]));
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums.at[r][t] = _mm256_fmadd_ps(w, xs[t], sums.at[r][t]);
  }
}

template <bool kNearEnd, int kAtOnce, int kTokens>
MK_AVX2 MK_INLINE void multiply(
    const Rows& rows, int first, const float* x, int64_t cols, float* sums) {
  Sums<kAtOnce, kTokens> acc;
  const float* next[kAtOnce];
#pragma GCC unroll 8
  for (int r = 0; r < kAtOnce; ++r) {
    next[r] = rows.kept[first + r];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      acc.at[r][t] = _mm256_setzero_ps();
  }
  uint32_t bits[kAtOnce];
  for (int64_t k = 0; k < cols; k += kWordBits) {
#pragma GCC unroll 8
    for (int r = 0; r < kAtOnce; ++r)
      bits[r] = rows.words[first + r][k / kWordBits];
    if (cols - k >= kWordBits) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kWordBits; i += kSpread) {
        add_columns<kNearEnd>(next, rows.kept_end, bits, x + k + i, cols, kSpread, acc);
        for (uint32_t& word : bits)
          word >>= kSpread;
      }
    } else {
      for (int64_t i = k; i < cols; i += kSpread) {
        const int64_t lanes = std::min(kSpread, cols - i);
        add_columns<kNearEnd>(next, rows.kept_end, bits, x + i, cols, lanes, acc);
        for (uint32_t& word : bits)
          word >>= kSpread;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kAtOnce; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      float lane[kSpread];
      _mm256_storeu_ps(lane, acc.at[r][t]);
      sums[(first + r) * kTokens + t] = std::accumulate(lane, lane + kSpread, 0.0f);
    }
}

template <int kTokens>
MK_AVX2 void micro_kernel(const Rows& rows, const float* x, int64_t cols, float* sums) {
  constexpr int kAtOnce = kTokens <= 2 ? 4 : kTokens <= 5 ? 2 : 1;
  const float* last = *std::max_element(rows.kept, rows.kept + kRows);
  const bool near_end = rows.kept_end - last < cols + kSpread;
  for (int first = 0; first < kRows; first += kAtOnce)
    if (near_end)
      multiply<true, kAtOnce, kTokens>(rows, first, x, cols, sums);
    else
      multiply<false, kAtOnce, kTokens>(rows, first, x, cols, sums);
}

constexpr Kernels kKernels = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>, micro_kernel<4>,
    micro_kernel<5>, micro_kernel<6>};

} // namespace avx2

namespace avx512 {

template <bool kNearEnd, int kTokens>
MK_AVX512 MK_INLINE void multiply(const Rows& rows, const float* x, int64_t cols, float* sums) {
  __m512 acc[kRows][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      acc[r][t] = _mm512_setzero_ps();

  Rows at = rows;
  for (int64_t k = 0; k < cols; k += kLanes) {
    const auto lanes = static_cast<__mmask16>(low_bits(cols - k));
    __m512 xs[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      xs[t] = _mm512_maskz_loadu_ps(lanes, x + t * cols + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      uint16_t bits;
      std::memcpy(&bits, reinterpret_cast<const char*>(at.words[r]) + k / 8, sizeof bits);
      const __m512 w = spread<kNearEnd>(at.kept[r], at.kept_end, bits);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        acc[r][t] = _mm512_fmadd_ps(w, xs[t], acc[r][t]);
    }
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums[r * kTokens + t] = _mm512_reduce_add_ps(acc[r][t]);
}

template <int kTokens>
MK_AVX512 void micro_kernel(const Rows& rows, const float* x, int64_t cols, float* sums) {
  const float* last = *std::max_element(rows.kept, rows.kept + kRows);
  if (rows.kept_end - last < cols + kLanes)
    multiply<true, kTokens>(rows, x, cols, sums);
  else
    multiply<false, kTokens>(rows, x, cols, sums);
}

constexpr Kernels kKernels = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>, micro_kernel<4>,
    micro_kernel<5>, micro_kernel<6>};

} // namespace avx512
#endif

} // namespace

void compact_linear(const CompactLinear& p, const Exec& exec) {
  const Kernels& kernels = MK_BY_ISA(exec.isa, kKernels);
  const int64_t token_blocks = ceil_div(p.tokens, kMaxTokens);
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  const int64_t row_words = words_per_row(p.cols);
  const int64_t work = p.tokens * std::max<int64_t>(p.cols, 1) * kRows;
  exec.parallel.run(
      0, ceil_div(p.rows, kRows), ceil_div(kGrain, work + 1), [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
          const int64_t first = group * kRows;
          Rows rows;
          rows.kept_end = p.kept + p.kept_count;
          for (int r = 0; r < kRows; ++r) {
            const int64_t row = std::min(first + r, p.rows - 1); // the last again; not used
            rows.kept[r] = p.kept + p.starts[row];
            rows.words[r] = p.words + row * row_words;
          }
          for (int64_t i = 0; i < token_blocks; ++i) {
            const int64_t token = p.tokens * i / token_blocks;
            const int64_t width = p.tokens * (i + 1) / token_blocks - token;
            float sums[kRows * kMaxTokens];
            kernels.by_tokens[width - 1](rows, p.x + token * p.cols, p.cols, sums);
            for (int64_t r = 0; r < std::min<int64_t>(kRows, p.rows - first); ++r)
              for (int64_t t = 0; t < width; ++t)
                p.y[(token + t) * p.rows + first + r] =
                    p.scale * sums[r * width + t] + (p.bias ? p.bias[first + r] : 0.0f);
          }
        }
      });
}

} // namespace masked_kernels
