// y [M, N] = epilogue(x [M, K] (w . m)^T) for values of any kind: the weight is decoded a panel of
// rows at a time, and a few tokens are multiplied with a panel at once, their sums in registers.
// Long rows are cut into blocks of columns, so that the panels of many rows stay in the L2 cache
// while all tokens pass, and the tokens in the L1 cache while all panels do.
#include "buffer.h"
#include "epilogue.h"
#include "row_windows.h"
#include "spread.h"

#include <algorithm>
#include <vector>

namespace masked_kernels {
namespace {

constexpr int64_t kMostRows = 32; // of a panel
constexpr int64_t kMostTokens = 12;
constexpr int64_t kPanelsFloats = 1 << 16; // of panels that are multiplied in turn
constexpr int64_t kBlockColumns = 1 << 9;  // about so many at once of rows of more than twice these
// Columns that one running sum takes. A total of short sums rounds less than a long sum.
constexpr int64_t kRun = 64;

// Some columns of the rows of a panel, from a word boundary on.
struct Rows {
  const float* values[kMostRows];
  const uint32_t* words[kMostRows];
  int64_t cols;
  const int64_t* places; // of the columns in the panel; null if they stay where they are
};

// panel [cols, rows] = the rows where their bits are set
using Fill = void (*)(const Rows& rows, float* panel);
// sums [tokens, rows] += the product of a panel [cols, rows] with the rows x
using Multiply = void (*)(const float* panel, const float* const* x, int64_t cols, float* sums);
// y of `count` tokens and of the rows of a panel, or those that there are
using Store = void (*)(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums);

template <int64_t kRows>
MK_INLINE void fill_body(const Rows& rows, int64_t col, float* panel) {
  for (; col < rows.cols; ++col) {
    float* const out = panel + (rows.places ? rows.places[col] : col) * kRows;
    for (int64_t row = 0; row < kRows; ++row) {
      const bool is_set = rows.words[row][col / kWordBits] >> col % kWordBits & 1;
      out[row] = is_set ? rows.values[row][col] : 0.0f;
    }
  }
}

template <int kLanes, int64_t kRows, int kTokens>
MK_INLINE void multiply_body(const float* panel, const float* const* x, int64_t cols, float* sums) {
  constexpr int kVectors = kRows / kLanes;
  const float* token[kTokens];
  for (int t = 0; t < kTokens; ++t)
    token[t] = x[t];
  for (int64_t run = 0; run < cols; run += kRun) {
    Floats<kLanes> sum[kTokens][kVectors] = {};
    const int64_t end = std::min(run + kRun, cols);
#pragma GCC unroll 4
    for (int64_t k = run; k < end; ++k, panel += kRows) {
      Floats<kLanes> w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        w[v] = load<kLanes>(panel + v * kLanes);
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        const Floats<kLanes> x_of = splat<kLanes>(token[t][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sum[t][v] += w[v] * x_of;
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* total = sums + t * kRows + v * kLanes;
        store<kLanes>(total, load<kLanes>(total) + sum[t][v]);
      }
    asm("" ::: "memory"); // totals stay there: registers are for the sums
  }
}

template <int kLanes, int64_t kRows>
MK_INLINE void store_body(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  for (int64_t lane = 0; lane < std::min(kRows, p.rows - row); lane += kLanes) {
    const int64_t first = row + lane, lanes = p.rows - first, at = token * p.rows + first;
    const Outputs<kLanes> outputs{sums + lane, kRows, count, lanes, p.y + at, p.rows};
    if (p.epilogue)
      outputs.finish(p.epilogue, first, at, p.rows);
    else
      outputs.shift(p.scale, p.bias ? load<kLanes>(p.bias + first, lanes) : Floats<kLanes>{});
  }
}

struct Kernels {
  SpreadRow spread_row;
  Fill fill;
  Store store;
  int64_t rows;   // of a panel
  int64_t tokens; // most at once
  Multiply by_tokens[kMostTokens];
};

namespace scalar {
constexpr int64_t kPanelRows = 16;
void fill(const Rows& rows, float* panel) {
  fill_body<kPanelRows>(rows, 0, panel);
}
template <int kTokens>
void multiply(const float* panel, const float* const* x, int64_t cols, float* sums) {
  multiply_body<4, kPanelRows, kTokens>(panel, x, cols, sums);
}
void store(const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  store_body<4, kPanelRows>(p, token, count, row, sums);
}
constexpr Kernels kKernels = {spread_row, fill, store, kPanelRows, 2, {multiply<1>, multiply<2>}};
} // namespace scalar

#if MK_X86
namespace avx2 {

constexpr int64_t kPanelRows = 16;

// Eight rows and four columns at a time. Once they are transposed, the bits of a column are those
// of eight words in the same place, which a shift takes to the signs of the lanes.
template <int64_t kRows, bool kStay>
MK_AVX2 MK_INLINE void fill_columns(const Rows& rows, int64_t first, float* panel) {
  constexpr int64_t kLanes = 8, kHalf = kLanes / 2;
  const float* values[kLanes];
  const uint32_t* words[kLanes];
  std::copy_n(rows.values + first, kLanes, values);
  std::copy_n(rows.words + first, kLanes, words);
  __m256 zero = _mm256_setzero_ps();
  asm("" : "+x"(zero)); // unknown, or the blend becomes two instructions
  __m256i bits = {};
  for (int64_t col = 0; col + kHalf <= rows.cols; col += kHalf) {
    if (col % kWordBits == 0) {
      const auto word = [&](int i) MK_AVX2 { return static_cast<int>(words[i][col / kWordBits]); };
      bits =
          _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
    }
    const auto pair = [&](int i) MK_AVX2 { // of rows i and i + 4
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(values[i] + col)),
          _mm_loadu_ps(values[i + kHalf] + col), 1);
    };
    const __m256 low[2] = {
        _mm256_unpacklo_ps(pair(0), pair(1)), _mm256_unpacklo_ps(pair(2), pair(3))};
    const __m256 high[2] = {
        _mm256_unpackhi_ps(pair(0), pair(1)), _mm256_unpackhi_ps(pair(2), pair(3))};
    const __m256 columns[kHalf] = {_mm256_shuffle_ps(low[0], low[1], _MM_SHUFFLE(1, 0, 1, 0)),
        _mm256_shuffle_ps(low[0], low[1], _MM_SHUFFLE(3, 2, 3, 2)),
        _mm256_shuffle_ps(high[0], high[1], _MM_SHUFFLE(1, 0, 1, 0)),
        _mm256_shuffle_ps(high[0], high[1], _MM_SHUFFLE(3, 2, 3, 2))};
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; ++i) {
      const __m256 signs = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 31 - i));
      float* const out = panel + (kStay ? col + i : rows.places[col + i]) * kRows + first;
      _mm256_store_ps(out, _mm256_blendv_ps(zero, columns[i], signs));
    }
    bits = _mm256_srli_epi32(bits, kHalf);
  }
}

template <int64_t kRows>
MK_AVX2 void fill(const Rows& rows, float* panel) {
  for (int64_t first = 0; first < kRows; first += 8)
    if (rows.places)
      fill_columns<kRows, false>(rows, first, panel);
    else
      fill_columns<kRows, true>(rows, first, panel);
  fill_body<kRows>(rows, rows.cols / 4 * 4, panel);
}
template <int kTokens>
MK_AVX2 void multiply(const float* panel, const float* const* x, int64_t cols, float* sums) {
  multiply_body<8, kPanelRows, kTokens>(panel, x, cols, sums);
}
MK_AVX2 void store(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  store_body<8, kPanelRows>(p, token, count, row, sums);
}
constexpr Kernels kKernels = {spread_row, fill<kPanelRows>, store, kPanelRows, 6,
    {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>}};
} // namespace avx2

namespace avx512 {

constexpr int64_t kPanelRows = 32; // two vectors: half the loads of x of one

template <int kTokens>
MK_AVX512 void multiply(const float* panel, const float* const* x, int64_t cols, float* sums) {
  multiply_body<16, kPanelRows, kTokens>(panel, x, cols, sums);
}
MK_AVX512 void store(
    const PanelLinear& p, int64_t token, int64_t count, int64_t row, const float* sums) {
  store_body<16, kPanelRows>(p, token, count, row, sums);
}
constexpr Kernels kKernels = {spread_row, avx2::fill<kPanelRows>, store, kPanelRows, 12,
    {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>,
        multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>}};
} // namespace avx512
#endif

// What is multiplied at once.
struct Part {
  Interval rows, tokens;
};

void multiply_part(const PanelLinear& p, const RowWindows<float>& windows, const Kernels& kernels,
    const Part& part) {
  const int64_t panel_rows = kernels.rows;
  const int64_t taps = p.patches ? p.patches.kernel_h * p.patches.kernel_w : 1;
  const int64_t all_channels = p.cols / taps;
  const bool is_cut = p.cols > 2 * kBlockColumns;
  const int64_t block = // channels, whose columns begin with a word
      is_cut ? ceil_div(kBlockColumns, taps * kWordBits) * kWordBits : all_channels;
  const int64_t block_cols = std::min(block, all_channels) * taps;
  const int64_t tiles = ceil_div(part.tokens.size(), kernels.tokens);
  const int64_t panels_at_once = std::clamp<int64_t>(
      kPanelsFloats / (block_cols * panel_rows + 1), 1, ceil_div(part.rows.size(), panel_rows));
  const int64_t rows_at_once = panels_at_once * panel_rows;
  const int64_t tile_sums = kernels.tokens * panel_rows;
  const Buffer panels(rows_at_once * block_cols);
  const Buffer patches(p.patches ? kernels.tokens * block_cols : 0);
  const Buffer sums(tile_sums * (is_cut ? tiles * panels_at_once : 1));
  const int64_t spread_stride = block_cols + panel_rows; // rows do not fight over cache sets
  const Buffer spread(p.starts ? panel_rows * spread_stride : 0);
  std::vector<const float*> kept(p.starts ? rows_at_once : 0); // of each row, the next values
  std::vector<int64_t> places;

  const auto fill_panels = [&](const Interval& rows, const Interval& channels) {
    const int64_t cols = channels.size() * taps, first = channels.begin * taps;
    if (taps > 1 && cols != static_cast<int64_t>(places.size())) {
      places.resize(cols);
      for (int64_t col = 0; col < cols; ++col)
        places[col] = col % taps * channels.size() + col / taps;
    }
    for (int64_t row = rows.begin; row < rows.end; row += panel_rows) {
      Rows from{{}, {}, cols, taps > 1 ? places.data() : nullptr};
      for (int64_t i = 0; i < panel_rows; ++i) {
        const int64_t at = row + i;
        if (at >= rows.end) { // the last again
          from.values[i] = from.values[i - 1];
          from.words[i] = from.words[i - 1];
          continue;
        }
        from.words[i] = p.words + at * words_per_row(p.cols) + first / kWordBits;
        if (p.starts) {
          const float*& next = kept[at - rows.begin];
          next = first == 0 ? p.values + p.starts[at] : next;
          float* const out = &spread[i * spread_stride];
          kernels.spread_row(next, p.values + p.period, from.words[i], cols, out);
          from.values[i] = out;
        } else {
          from.values[i] = windows.at(at * p.cols % p.period) + first;
        }
      }
      kernels.fill(from, &panels[(row - rows.begin) * cols]);
    }
  };

  const auto multiply_block = [&](const Interval& rows, const Interval& channels) {
    const int64_t cols = channels.size() * taps;
    float* sum = sums.data();
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t token = part.tokens.begin + part.tokens.size() * tile / tiles;
      const int64_t count = part.tokens.begin + part.tokens.size() * (tile + 1) / tiles - token;
      if (p.patches)
        p.patches.copy(p.x, {token, token + count}, channels, patches.data(), cols);
      const float* x[kMostTokens];
      for (int64_t t = 0; t < count; ++t)
        x[t] = p.patches ? &patches[t * cols] : p.x + (token + t) * p.cols + channels.begin;
      const Multiply multiply = kernels.by_tokens[count - 1];
      for (int64_t row = rows.begin; row < rows.end; row += panel_rows) {
        if (channels.begin == 0)
          std::fill_n(sum, count * panel_rows, 0.0f);
        multiply(&panels[(row - rows.begin) * cols], x, cols, sum);
        if (channels.end == all_channels)
          kernels.store(p, token, count, row, sum);
        sum += is_cut ? tile_sums : 0; // where they wait for the next block
      }
    }
  };

  for (int64_t row = part.rows.begin; row < part.rows.end; row += rows_at_once) {
    const Interval rows{row, std::min(row + rows_at_once, part.rows.end)};
    Interval channels{0, 0};
    do { // once even where there are none: the bias remains
      channels = {channels.end, std::min(channels.end + block, all_channels)};
      fill_panels(rows, channels);
      multiply_block(rows, channels);
    } while (channels.end < all_channels);
  }
}

} // namespace

void panel_linear(const PanelLinear& p, const Exec& exec) {
  constexpr int64_t kGrain = 1 << 17;        // products worth waking a thread for
  constexpr int64_t kManyTokens = 1 << 9;    // of each thread, worth decoding the weight for
  constexpr int64_t kTokensAtOnce = 1 << 11; // whose sums may wait; the next decode it anew
  if (p.tokens * p.rows == 0)
    return;
  const Kernels& kernels = MK_BY_ISA(exec.isa, kKernels);
  const RowWindows<float> windows(p.values, p.period, p.starts ? 0 : p.rows, p.cols);
  const int64_t products = std::max<int64_t>(p.cols, 1), threads = exec.parallel.threads();
  const int64_t panel_rows = kernels.rows;
  const int64_t panels = ceil_div(p.rows, panel_rows), tiles = ceil_div(p.tokens, kernels.tokens);
  const auto multiply = [&](const Interval& rows, const Interval& tokens) {
    for (int64_t token = tokens.begin; token < tokens.end; token += kTokensAtOnce)
      multiply_part(
          p, windows, kernels, {rows, {token, std::min(token + kTokensAtOnce, tokens.end)}});
  };
  if (p.tokens >= kManyTokens * threads || panels < threads)
    exec.parallel.run(0, tiles, ceil_div(kGrain, products * p.rows * kernels.tokens),
        [&](int64_t begin, int64_t end) {
          multiply({0, p.rows}, {begin * kernels.tokens, std::min(end * kernels.tokens, p.tokens)});
        });
  else
    exec.parallel.run(0, panels, ceil_div(kGrain, products * p.tokens * panel_rows),
        [&](int64_t begin, int64_t end) {
          multiply({begin * panel_rows, std::min(end * panel_rows, p.rows)}, {0, p.tokens});
        });
}

} // namespace masked_kernels
