// The inner loops of aligned_linear: tables of subset sums, and the products looked up in them.
//
// Two ways. With *rows in lanes* a table of one token lies in registers, and a permutation looks
// the same columns of many rows up at once: for few tokens. With *tokens in lanes* each subset has
// a vector of its sums for many tokens, and a row adds the one that its bits name, straight from
// the L1 cache: an instruction for the products of five columns with eight or sixteen tokens.
#pragma once

#include "prefetch.h"
#include "square.h"
#include "vector.h"

#include "masked_kernels/kernels.h"

#include <algorithm>

namespace masked_kernels {
namespace {

constexpr int64_t kBlockRows = AlignedRows::kBlock;
constexpr int64_t kTableColumns = 5, kSubsets = 1 << kTableColumns; // of a table
constexpr int64_t kWordTables = kTileColumns / kTableColumns;
constexpr int64_t kTableFloats = kWordTables * kSubsets; // of a word, per token
constexpr int64_t kMostFewTokens = 6, kMostTokens = 16;
constexpr int64_t kFewWords = 9; // of columns whose tables for 6 tokens fit the L1 cache
constexpr int64_t kMostScaled = kMostFewTokens * kFewWords * kTileColumns;
// Words of columns that one running sum takes. A total of short sums rounds less than a long sum.
constexpr int64_t kRunWords = 3;
constexpr int64_t kAllBlocks = INT64_MAX;

int64_t tile_words(int64_t columns) {
  return ceil_div(columns, kTileColumns);
}

// row [cols] = a prototype, repeated
void repeat_values(const float* values, int64_t period, int64_t cols, float* row) {
  for (int64_t k = 0; k < cols; k += period)
    std::copy_n(values, std::min(period, cols - k), row + k);
}

// Columns of some tokens: x [tokens, stride], of which `count` columns are multiplied by a value
// each. Those that tables have above that are 0.
struct Columns {
  const float* x;
  int64_t stride, tokens, count;
  const float* values;

  // scaled [tokens, columns]
  template <int kLanes>
  MK_INLINE void scale_to(float* scaled, int64_t columns) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < columns; k += kLanes) {
        const int64_t there = std::max<int64_t>(count - k, 0);
        store<kLanes>(scaled + t * columns + k,
            load<kLanes>(x + t * stride + k, there) * load<kLanes>(values + k, there), columns - k);
      }
  }
};

// The tables of `columns` columns, a multiple of kTileColumns.
using BuildTables = void (*)(const Columns& x, int64_t columns, float* tables);

// sums [blocks, tokens, 16] += what the rows' bits look up in the tables of `columns` columns; =
// with the first columns. A block's tile is [words, 16]; that of the next block lies `tile_stride`
// words on.
using MicroKernel = void (*)(const uint32_t* tiles, int64_t tile_stride, int64_t columns,
    const float* tables, bool first, float* sums, const Ahead& y_ahead, const Ahead& x_ahead);

// by_token [tokens, 16] = sums [16, tokens]
using ByToken = void (*)(const float* sums, float* by_token);

// How some tokens are multiplied at once.
struct Pass {
  int tokens;
  int64_t words; // of columns whose tables fit the L1 cache
  BuildTables build_tables;
  int blocks; // of rows at once
  MicroKernel kernel;
  MicroKernel single;         // for the blocks that remain
  ByToken by_token = nullptr; // where a block's sums are [16, tokens] until they are complete
};

struct Passes {
  Pass few[kMostFewTokens];          // for 1, 2, ... tokens
  Pass many[2];                      // for 16 and for 8 tokens, not all of which need to be there
  int64_t most;                      // tokens of a pass
  int64_t blocks;                    // whose sums fit the L2 cache
  int64_t most_few = kMostFewTokens; // that passes of few tokens serve best

  bool has_many() const { return most > kMostFewTokens; }

  // Of tables that a pass keeps, for each of its tokens.
  int64_t most_words() const {
    int64_t words = kMostFewTokens * kFewWords;
    for (const Pass& pass : many)
      words = std::max(words, pass.tokens * pass.words);
    return words;
  }

  // Tokens that threads share, so that all but the last pass of each are full.
  int64_t unit() const { return has_many() ? most : 1; }

  // For the first of `tokens` tokens; those that it has above that are 0.
  const Pass& first_of(int64_t tokens) const {
    if (has_many() && tokens > most_few)
      return many[tokens <= many[1].tokens];
    return few[tokens / ceil_div(tokens, kMostFewTokens) - 1];
  }
};

namespace scalar {

template <int kTokens>
void micro_kernel(const uint32_t* tile, int64_t, int64_t columns, const float* tables, bool first,
    float* sums, const Ahead&, const Ahead&) {
  if (first)
    std::fill_n(sums, kTokens * kBlockRows, 0.0f);
  for (int64_t word = 0; word < tile_words(columns); ++word) {
    float acc[kTokens * kBlockRows] = {};
    for (int64_t table = 0; table < kWordTables; ++table, tables += kTokens * kSubsets)
      for (int64_t lane = 0; lane < kBlockRows; ++lane) {
        const uint32_t index =
            tile[word * kBlockRows + lane] >> table * kTableColumns & (kSubsets - 1);
        for (int t = 0; t < kTokens; ++t)
          acc[t * kBlockRows + lane] += tables[t * kSubsets + index];
      }
    for (int64_t i = 0; i < kTokens * kBlockRows; ++i)
      sums[i] += acc[i];
  }
}

void build_tables(const Columns& x, int64_t columns, float* tables) {
  float scaled[kMostScaled];
  x.scale_to<4>(scaled, columns);
  for (int64_t k = 0; k < columns; k += kTableColumns)
    for (int64_t t = 0; t < x.tokens; ++t, tables += kSubsets)
      for (int64_t subset = 0; subset < kSubsets; ++subset) {
        tables[subset] = 0.0f;
        for (int64_t j = 0; j < kTableColumns; ++j)
          tables[subset] += subset >> j & 1 ? scaled[t * columns + k + j] : 0.0f;
      }
}

template <int kTokens>
constexpr Pass pass() {
  return {kTokens, kMostFewTokens * kFewWords / kTokens, build_tables, 1, micro_kernel<kTokens>,
      micro_kernel<kTokens>};
}

constexpr Passes kPasses = {{pass<1>(), pass<2>(), pass<3>(), pass<4>(), pass<5>(), pass<6>()}, {},
    kMostFewTokens, kAllBlocks};

} // namespace scalar

#if MK_X86
// Tokens in lanes: `kVectors` vectors of them for each subset.

// sums [blocks, 16, tokens], those of `kRows` rows at once in registers
template <int kLanes, int kVectors, int kRows>
MK_INLINE void add_looked_up_body(const uint32_t* tile, int64_t tile_stride, int64_t columns,
    const float* tables, bool first, float* sums) {
  constexpr int kTokens = kVectors * kLanes;
  constexpr int kLogTokens = __builtin_ctz(kTokens);
  constexpr uint32_t kOffsets = (kSubsets - 1) * kTokens;
  const int64_t words = tile_words(columns), count = ceil_div(columns, kTableColumns);
  for (int64_t word = 0; word < words; ++word) // of the next block, too far on to be foreseen
    __builtin_prefetch(tile + tile_stride + word * kBlockRows);
  for (int64_t row = 0; row < kBlockRows; row += kRows, sums += kRows * kTokens) {
    Floats<kLanes> acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = Floats<kLanes>{};
    const float* table = tables;
    for (int64_t word = 0; word < words; ++word) {
      uint64_t bits[kRows / 2]; // of two rows each
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r += 2)
        std::memcpy(&bits[r / 2], tile + word * kBlockRows + row + r, sizeof bits[0]);
#pragma GCC unroll 8
      for (int i = 0; i < kWordTables; ++i, table += kSubsets * kTokens) {
        if (word * kWordTables + i == count)
          break;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          // A rotation: one instruction to another register, where a shift takes two.
          const int by = (i * kTableColumns + r % 2 * kWordBits - kLogTokens) & 63;
          uint64_t offset = (bits[r / 2] >> by | bits[r / 2] << (-by & 63)) & kOffsets;
          // One offset before the sum that needs the one before: GCC makes all first, and spills.
          if constexpr (kVectors == 1)
            asm volatile("" : "+r"(offset), "+v"(acc[r][0]));
          else
            asm volatile("" : "+r"(offset), "+v"(acc[r][0]), "+v"(acc[r][1]));
          const float* sums_of = table + offset;
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            acc[r][v] += load<kLanes>(sums_of + v * kLanes);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + r * kTokens + v * kLanes;
        store<kLanes>(sum, first ? acc[r][v] : load<kLanes>(sum) + acc[r][v]);
      }
  }
}

// tables [columns / 5, 32, tokens] of x [columns, stride], a value for each column.
template <int kLanes, int kVectors>
MK_INLINE void add_up_subsets(
    const float* x, int64_t stride, const float* values, int64_t columns, float* tables) {
  constexpr int kTokens = kVectors * kLanes;
  for (int64_t k = 0; k < columns; k += kTableColumns, tables += kSubsets * kTokens)
#pragma GCC unroll 2
    for (int v = 0; v < kTokens; v += kLanes) {
      Floats<kLanes> with[kTableColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kTableColumns; ++j)
        with[j] = load<kLanes>(x + (k + j) * stride + v) * values[k + j];
      Floats<kLanes> low[kSubsets / 4] = {}; // subsets of the first three columns
#pragma GCC unroll 4
      for (int j = 0; j < kTableColumns - 2; ++j)
#pragma GCC unroll 4
        for (int subset = 0; subset < 1 << j; ++subset)
          low[subset + (1 << j)] = low[subset] + with[j];
      const Floats<kLanes> high[4] = {{}, with[3], with[4], with[3] + with[4]};
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h)
#pragma GCC unroll 8
        for (int subset = 0; subset < kSubsets / 4; ++subset)
          store<kLanes>(tables + (h * (kSubsets / 4) + subset) * kTokens + v,
              h == 0 ? low[subset] : low[subset] + high[h]);
    }
}

template <int kLanes, int kVectors, int64_t kMostWords>
MK_INLINE void build_token_tables_body(const Columns& x, int64_t columns, float* tables) {
  constexpr int kTokens = kVectors * kLanes;
  constexpr int64_t kMostColumns = kMostWords * kTileColumns;
  float padded[kTokens * kMostColumns], values[kMostColumns];
  const float *from = x.x, *value = x.values;
  int64_t stride = x.stride;
  if (x.tokens < kTokens || x.count < columns) {
    std::fill_n(padded, kTokens * columns, 0.0f);
    for (int64_t t = 0; t < x.tokens; ++t)
      std::copy_n(x.x + t * x.stride, x.count, padded + t * columns);
    std::fill_n(std::copy_n(x.values, x.count, values), columns - x.count, 0.0f);
    from = padded, value = values, stride = columns;
  }
  alignas(64) float by_column[kMostColumns][kTokens];
  transpose_squares(from, stride, kTokens, columns, by_column[0]);
  add_up_subsets<kLanes, kVectors>(
      by_column[0], kTokens, value, ceil_div(x.count, kTableColumns) * kTableColumns, tables);
}

template <int kTokens>
void by_token(const float* sums, float* by_token) {
  transpose_squares(sums, kTokens, kBlockRows, kTokens, by_token);
}

namespace avx2 {

// Rows in lanes: the 8 sums of 3 columns, and half a block.
constexpr int64_t kHalf = kBlockRows / 2;
constexpr int64_t kColumns = 3, kTables = kTileColumns / kColumns;

// As in avx512, but the totals stay in memory: registers are few.
template <int kBlocks, int kTokens>
MK_AVX2 void micro_kernel(const uint32_t* tiles, int64_t tile_stride, int64_t columns,
    const float* tables, bool first, float* sums, const Ahead& y_ahead, const Ahead& x_ahead) {
  y_ahead.fetch();
  x_ahead.fetch();
  const int64_t words = tile_words(columns);
  for (int64_t word = 0; word < words; ++word, tiles += kBlockRows) {
    __m256i index[2 * kBlocks];
    __m256 acc[2 * kBlocks][kTokens];
#pragma GCC unroll 8
    for (int b = 0; b < 2 * kBlocks; ++b) {
      const uint32_t* half = tiles + b / 2 * tile_stride + b % 2 * kHalf;
      index[b] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half));
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        acc[b][t] = _mm256_setzero_ps();
    }
#pragma GCC unroll 1
    for (int64_t table = 0; table < kTables; ++table, tables += kTokens * kHalf) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        __m256 sum_of = _mm256_load_ps(tables + t * kHalf);
        asm("" : "+x"(sum_of)); // a permutation of memory takes Zen 3 twice as long
#pragma GCC unroll 8
        for (int b = 0; b < 2 * kBlocks; ++b) { // by the low 3 bits of a lane
          const __m256 sum = _mm256_permutevar8x32_ps(sum_of, index[b]);
          acc[b][t] = _mm256_add_ps(acc[b][t], sum);
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < 2 * kBlocks; ++b)
        index[b] = _mm256_srli_epi32(index[b], kColumns);
    }
#pragma GCC unroll 8
    for (int b = 0; b < 2 * kBlocks; ++b)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        float* sum = sums + ((b / 2 * kTokens + t) * 2 + b % 2) * kHalf;
        const bool begins = first && word == 0;
        _mm256_store_ps(sum, begins ? acc[b][t] : _mm256_add_ps(_mm256_load_ps(sum), acc[b][t]));
      }
  }
}

// Lanes whose subset holds column j.
MK_AVX2 MK_INLINE __m256 subsets_with(int j) {
  const __m256i subset = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i bit = _mm256_set1_epi32(1 << j);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(subset, bit), bit));
}

MK_AVX2 void build_tables(const Columns& x, int64_t columns, float* tables) {
  float scaled[kMostScaled];
  x.scale_to<8>(scaled, columns);
  const __m256 with[kColumns] = {subsets_with(0), subsets_with(1), subsets_with(2)};
  for (int64_t k = 0; k < columns; k += kColumns)
    for (int64_t t = 0; t < x.tokens; ++t, tables += kHalf) {
      const float* three = scaled + t * columns + k;
      __m256 sums = _mm256_setzero_ps();
      for (int64_t i = 0; i < kColumns; ++i)
        sums = _mm256_add_ps(sums, _mm256_and_ps(with[i], _mm256_set1_ps(three[i])));
      _mm256_store_ps(tables, sums);
    }
}

constexpr int kTokenLanes = 8;
constexpr int64_t kManyWords = 4; // of columns whose tables for 8 tokens fit the L1 cache

template <int kVectors>
MK_AVX2 void add_looked_up(const uint32_t* tile, int64_t tile_stride, int64_t columns,
    const float* tables, bool first, float* sums, const Ahead& y_ahead, const Ahead& x_ahead) {
  y_ahead.fetch();
  x_ahead.fetch();
  add_looked_up_body<kTokenLanes, kVectors, 8 / kVectors>(
      tile, tile_stride, columns, tables, first, sums);
}

template <int kVectors>
MK_AVX2 void build_token_tables(const Columns& x, int64_t columns, float* tables) {
  build_token_tables_body<kTokenLanes, kVectors, kManyWords / kVectors>(x, columns, tables);
}

template <int kBlocks, int kTokens>
constexpr Pass few() {
  return {kTokens, kMostFewTokens * kFewWords / kTokens, build_tables, kBlocks,
      micro_kernel<kBlocks, kTokens>, micro_kernel<1, kTokens>};
}

template <int kVectors>
constexpr Pass many() {
  constexpr int kTokens = kVectors * kTokenLanes;
  return {kTokens, kManyWords / kVectors, build_token_tables<kVectors>, 1, add_looked_up<kVectors>,
      add_looked_up<kVectors>, by_token<kTokens>};
}

constexpr Passes kPasses = {
    {few<3, 1>(), few<2, 2>(), few<1, 3>(), few<1, 4>(), few<1, 5>(), few<1, 6>()},
    {many<2>(), many<1>()}, kMostTokens, 128};

} // namespace avx2

namespace avx512 {

// Running sums of kRunWords words at most, then added to `sums`.
template <int kBlocks, int kTokens>
MK_AVX512 MK_INLINE void add_run(const uint32_t* tiles, int64_t tile_stride, int64_t words,
    const float* tables, bool first, float* sums) {
  __m512 acc[kBlocks][kTokens] = {};
  for (int64_t word = 0; word < words; ++word, tiles += kBlockRows) {
    __m512i index[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
      index[b] = _mm512_loadu_si512(tiles + b * tile_stride);
    // Unrolled, GCC looks everything up first and runs out of registers.
#pragma GCC unroll 1
    for (int64_t table = 0; table < kWordTables; ++table, tables += kTokens * kSubsets) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const __m512 low = _mm512_load_ps(tables + t * kSubsets);
        const __m512 high = _mm512_load_ps(tables + t * kSubsets + kBlockRows);
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) // by the low 5 bits of a lane
          acc[b][t] = _mm512_add_ps(acc[b][t], _mm512_permutex2var_ps(low, index[b], high));
      }
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b)
        index[b] = _mm512_srli_epi32(index[b], kTableColumns);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t, sums += kBlockRows)
      _mm512_store_ps(sums, first ? acc[b][t] : _mm512_add_ps(_mm512_load_ps(sums), acc[b][t]));
}

template <int kBlocks, int kTokens>
MK_AVX512 void micro_kernel(const uint32_t* tiles, int64_t tile_stride, int64_t columns,
    const float* tables, bool first, float* sums, const Ahead& y_ahead, const Ahead& x_ahead) {
  Ahead y_rest = y_ahead, x_rest = x_ahead;
  const int64_t words = tile_words(columns), runs = ceil_div(words, kRunWords);
  const int64_t y_lines = ceil_div(y_ahead.lines(), runs),
                x_lines = ceil_div(x_ahead.lines(), runs);
  for (int64_t word = 0; word < words; word += kRunWords) {
    y_rest.take(y_lines).fetch();
    x_rest.take(x_lines).fetch();
    add_run<kBlocks, kTokens>(tiles + word * kBlockRows, tile_stride,
        std::min(kRunWords, words - word), tables + word * kTokens * kTableFloats,
        first && word == 0, sums);
  }
}

MK_AVX512 void build_tables(const Columns& x, int64_t columns, float* tables) {
  float scaled[kMostScaled];
  x.scale_to<16>(scaled, columns);
  for (int64_t k = 0; k < columns; k += kTableColumns)
    for (int64_t t = 0; t < x.tokens; ++t, tables += kSubsets) {
      const float* five = scaled + t * columns + k;
      __m512 low = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(five[0])); // subsets with column 0
      low = _mm512_mask_add_ps(low, 0xcccc, low, _mm512_set1_ps(five[1]));
      low = _mm512_mask_add_ps(low, 0xf0f0, low, _mm512_set1_ps(five[2]));
      low = _mm512_mask_add_ps(low, 0xff00, low, _mm512_set1_ps(five[3]));
      _mm512_store_ps(tables, low);
      _mm512_store_ps(tables + kBlockRows, _mm512_add_ps(low, _mm512_set1_ps(five[4])));
    }
}

template <int kBlocks, int kTokens>
constexpr Pass few() {
  return {kTokens, kMostFewTokens * kFewWords / kTokens, build_tables, kBlocks,
      micro_kernel<kBlocks, kTokens>, micro_kernel<1, kTokens>};
}

constexpr int64_t kManyWords = 3; // of columns whose tables for 16 tokens fit the L1 cache

MK_AVX512 void add_looked_up(const uint32_t* tile, int64_t tile_stride, int64_t columns,
    const float* tables, bool first, float* sums, const Ahead& y_ahead, const Ahead& x_ahead) {
  y_ahead.fetch();
  x_ahead.fetch();
  add_looked_up_body<kMostTokens, 1, kBlockRows>(tile, tile_stride, columns, tables, first, sums);
}

MK_AVX512 void build_token_tables(const Columns& x, int64_t columns, float* tables) {
  build_token_tables_body<kMostTokens, 1, kManyWords>(x, columns, tables);
}

constexpr Passes kPasses = {
    {few<8, 1>(), few<8, 2>(), few<6, 3>(), few<4, 4>(), few<4, 5>(), few<4, 6>()},
    {{kMostTokens, kManyWords, build_token_tables, 1, add_looked_up, add_looked_up,
        by_token<kMostTokens>}},
    kMostTokens, 128, 14};

} // namespace avx512
#endif

} // namespace
} // namespace masked_kernels
