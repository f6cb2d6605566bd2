// y [M, N] = epilogue(x [M, K] (w . m)^T) for values of any kind: the weight is decoded a panel of
// 16 rows at a time, [K, 16], and a few tokens are multiplied with a panel at once, their sums in
// registers. Panels stay in the L2 cache, the tokens in the L1 cache while all panels pass.
#include "buffer.h"
#include "epilogue.h"
#include "square.h"

#include <algorithm>

namespace masked_kernels {
namespace {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kMostTokens = 12;
// After each decoded row: rows a power of two apart would fight over the same cache sets.
constexpr int64_t kPadding = 16;
constexpr int64_t kPanelsFloats = 1 << 16; // of panels that are multiplied in turn
// Columns that one running sum takes. A total of short sums rounds less than a long sum.
constexpr int64_t kRun = 64;

// sums [tokens, 16] = the product of a panel [cols, 16] with the rows x
using Multiply = void (*)(const float* panel, const float* const* x, int64_t cols, float* sums);
// panel [cols, 16] = the transpose of rows [16, cols], kPadding floats apart
using Transpose = void (*)(const float* rows, int64_t cols, float* panel);
// y of `count` tokens and of up to 16 rows
using Store = void (*)(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums);

template <int kLanes, int kTokens>
MK_INLINE void multiply_body(const float* panel, const float* const* x, int64_t cols, float* sums) {
  constexpr int kVectors = kPanelRows / kLanes;
  const float* token[kTokens];
  for (int t = 0; t < kTokens; ++t)
    token[t] = x[t];
  std::fill_n(sums, kTokens * kPanelRows, 0.0f);
  for (int64_t run = 0; run < cols; run += kRun) {
    Floats<kLanes> sum[kTokens][kVectors] = {};
    for (int64_t k = run; k < std::min(run + kRun, cols); ++k, panel += kPanelRows) {
      Floats<kLanes> w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        w[v] = load<kLanes>(panel + v * kLanes);
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sum[t][v] += w[v] * token[t][k];
    }
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* total = sums + t * kPanelRows + v * kLanes;
        store<kLanes>(total, load<kLanes>(total) + sum[t][v]);
      }
  }
}

template <int kLanes>
MK_INLINE void store_body(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  for (int64_t lane = 0; lane < std::min(kPanelRows, p.rows - row); lane += kLanes) {
    const int64_t first = row + lane, lanes = p.rows - first, at = token * p.rows + first;
    const Outputs<kLanes> outputs{sums + lane, kPanelRows, count, lanes, p.y + at, p.rows};
    if (p.epilogue)
      outputs.finish(p.epilogue, first, at, p.rows);
    else
      outputs.shift(p.scale, p.bias ? load<kLanes>(p.bias + first, lanes) : Floats<kLanes>{});
  }
}

MK_INLINE void transpose_body(const float* rows, int64_t cols, int64_t col, float* panel) {
  for (; col < cols; ++col)
    for (int64_t row = 0; row < kPanelRows; ++row)
      panel[col * kPanelRows + row] = rows[row * (cols + kPadding) + col];
}

struct Kernels {
  int64_t tokens; // at once
  Multiply multiply;
  Transpose transpose;
  Store store;
};

namespace scalar {
void multiply(const float* panel, const float* const* x, int64_t cols, float* sums) {
  multiply_body<4, 2>(panel, x, cols, sums);
}
void transpose(const float* rows, int64_t cols, float* panel) {
  transpose_body(rows, cols, 0, panel);
}
void store(const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  store_body<4>(p, token, count, row, sums);
}
constexpr Kernels kKernels = {2, multiply, transpose, store};
} // namespace scalar

#if MK_X86
namespace avx2 {
MK_AVX2 void multiply(const float* panel, const float* const* x, int64_t cols, float* sums) {
  multiply_body<8, 6>(panel, x, cols, sums);
}
MK_AVX2 void transpose(const float* rows, int64_t cols, float* panel) {
  constexpr int64_t kLanes = 8;
  int64_t col = 0;
  for (; col + kLanes <= cols; col += kLanes)
    for (int64_t row = 0; row < kPanelRows; row += kLanes)
      transpose_square(rows + row * (cols + kPadding) + col, cols + kPadding,
          panel + col * kPanelRows + row, kPanelRows);
  transpose_body(rows, cols, col, panel);
}
MK_AVX2 void store(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  store_body<8>(p, token, count, row, sums);
}
constexpr Kernels kKernels = {6, multiply, transpose, store};
} // namespace avx2

namespace avx512 {
MK_AVX512 void multiply(const float* panel, const float* const* x, int64_t cols, float* sums) {
  multiply_body<16, 12>(panel, x, cols, sums);
}
MK_AVX512 void store(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  store_body<16>(p, token, count, row, sums);
}
constexpr Kernels kKernels = {12, multiply, avx2::transpose, store};
} // namespace avx512
#endif

// Rows and tokens of a thread.
struct Part {
  int64_t row_begin, row_end, token_begin, token_end;
};

void multiply_part(const PanelLinear& p, const Kernels& kernels, Isa isa, const Part& part) {
  const int64_t panel_floats = std::max<int64_t>(p.cols, 1) * kPanelRows;
  const int64_t rows_at_once =
      std::min(std::max<int64_t>(kPanelsFloats / panel_floats, 1) * kPanelRows,
          ceil_div(part.row_end - part.row_begin, kPanelRows) * kPanelRows);
  const int64_t decoded_row = p.cols + kPadding;
  const Buffer panels(rows_at_once / kPanelRows * panel_floats), decoded(kPanelRows * decoded_row);
  const Buffer patches(p.patches ? kernels.tokens * p.cols : 0);
  alignas(64) float sums[kMostTokens * kPanelRows];
  const Serial serial;
  const int64_t taps = p.patches ? p.patches.kernel_h * p.patches.kernel_w : 1;

  for (int64_t first = part.row_begin; first < part.row_end; first += rows_at_once) {
    const int64_t end = std::min(first + rows_at_once, part.row_end);
    for (int64_t row = first; row < end; row += kPanelRows) {
      const int64_t count = std::min(kPanelRows, end - row);
      decode({p.values, p.period, sizeof(float), p.words, p.cols, row, row + count, decoded.data(),
                 taps, kPadding},
          {isa, serial});
      std::fill_n(decoded.data() + count * decoded_row, (kPanelRows - count) * decoded_row, 0.0f);
      kernels.transpose(decoded.data(), p.cols, &panels[(row - first) * p.cols]);
    }
    for (int64_t token = part.token_begin; token < part.token_end; token += kernels.tokens) {
      const int64_t count = std::min(kernels.tokens, part.token_end - token);
      if (p.patches)
        p.patches.copy(p.x, token, count, patches.data(), p.cols);
      const float* const from = p.patches ? patches.data() : p.x + token * p.cols;
      const float* x[kMostTokens]; // the last again for those that are not there
      for (int64_t t = 0; t < kernels.tokens; ++t)
        x[t] = from + std::min(t, count - 1) * p.cols;
      for (int64_t row = first; row < end; row += kPanelRows) {
        kernels.multiply(&panels[(row - first) * p.cols], x, p.cols, sums);
        kernels.store(p, token, count, row, sums);
      }
    }
  }
}

} // namespace

void panel_linear(const PanelLinear& p, const Exec& exec) {
  constexpr int64_t kGrain = 1 << 17;     // products worth waking a thread for
  constexpr int64_t kManyTokens = 1 << 9; // of each thread, worth decoding the weight for
  const Kernels& kernels = MK_BY_ISA(exec.isa, kKernels);
  const int64_t products = std::max<int64_t>(p.cols, 1), threads = exec.parallel.threads();
  const int64_t panels = ceil_div(p.rows, kPanelRows), tiles = ceil_div(p.tokens, kernels.tokens);
  if (p.tokens * p.rows == 0)
    return;
  if (p.tokens >= kManyTokens * threads || panels < threads)
    exec.parallel.run(0, tiles, ceil_div(kGrain, products * p.rows * kernels.tokens),
        [&](int64_t begin, int64_t end) {
          multiply_part(p, kernels, exec.isa,
              {0, p.rows, begin * kernels.tokens, std::min(end * kernels.tokens, p.tokens)});
        });
  else
    exec.parallel.run(0, panels, ceil_div(kGrain, products * p.tokens * kPanelRows),
        [&](int64_t begin, int64_t end) {
          multiply_part(p, kernels, exec.isa,
              {begin * kPanelRows, std::min(end * kPanelRows, p.rows), 0, p.tokens});
        });
}

} // namespace masked_kernels
