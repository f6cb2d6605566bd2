// y [M, N] = scale * x [M, K] (w . m)^T + bias for a prototype aligned with the rows: every row
// reads one of few value vectors v_0 .. v_{c-1}, row o reading v_{o % c}.
//
// Then the weight need not be multiplied at all: scale x by v_p, and each product is a sum of those
// x whose bit is set. Four columns have 16 such sums. A table of them fills one vector register,
// and one permutation looks up four columns of 16 rows at once, 64 products that a fused
// multiply-add would need four instructions for. The sums are those of float32, nothing is rounded
// that a dot product would not round.
#include "target.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <array>
#include <vector>

namespace masked_kernels {
namespace {

constexpr int kMaxBlocks = 8, kMaxTokens = 6;
constexpr int64_t kLanes = AlignedRows::kBlock; // also the sums in a table
constexpr int64_t kTableColumns = 4;            // columns of a table
constexpr int64_t kWordTables = kWordBits / kTableColumns;
constexpr int64_t kCachedWords = 12; // of columns whose tables for kMaxTokens fit the L1 cache

// sums [blocks, tokens, 16] += the looked-up tables [words * 8, tokens, 16] of `words` words of
// columns. A block's tile is [words, 16]; that of the next block lies `tile_stride` words on.
using MicroKernel = void (*)(
    const uint32_t* tiles, int64_t tile_stride, int64_t words, const float* tables, float* sums);

struct Variant {
  int blocks; // at once
  MicroKernel kernel;
  MicroKernel single; // for the blocks that remain
};

// tables [columns / 4, tokens, 16] from x [tokens, columns], columns a multiple of 32
using BuildTables = void (*)(const float* x, int64_t tokens, int64_t columns, float* tables);

// out [count] = x . values
using Scale = void (*)(const float* x, const float* values, int64_t count, float* out);

// y [tokens, count] = scale * sums [tokens, 16] + bias [16], count at most 16
using Finish = void (*)(const float* sums, int64_t tokens, float scale, const float* bias,
    int64_t count, float* y, int64_t y_stride);

struct Kernels {
  Scale scale;
  BuildTables build_tables;
  Finish finish;
  Variant by_tokens[kMaxTokens];
};

namespace scalar {

template <int kTokens>
void micro_kernel(const uint32_t* tile, int64_t, int64_t words, const float* tables, float* sums) {
  for (int64_t word = 0; word < words; ++word) {
    float acc[kTokens * kLanes] = {};
    for (int64_t table = 0; table < kWordTables; ++table, tables += kTokens * kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t index = tile[word * kLanes + lane] >> table * kTableColumns & 15;
        for (int t = 0; t < kTokens; ++t)
          acc[t * kLanes + lane] += tables[t * kLanes + index];
      }
    for (int64_t i = 0; i < kTokens * kLanes; ++i)
      sums[i] += acc[i];
  }
}

void build_tables(const float* x, int64_t tokens, int64_t columns, float* tables) {
  for (int64_t k = 0; k < columns; k += kTableColumns)
    for (int64_t t = 0; t < tokens; ++t, tables += kLanes)
      for (int64_t subset = 0; subset < kLanes; ++subset) {
        tables[subset] = 0.0f;
        for (int64_t j = 0; j < kTableColumns; ++j)
          tables[subset] += subset >> j & 1 ? x[t * columns + k + j] : 0.0f;
      }
}

void scale(const float* x, const float* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = x[i] * values[i];
}

void finish(const float* sums, int64_t tokens, float scale, const float* bias, int64_t count,
    float* y, int64_t y_stride) {
  for (int64_t t = 0; t < tokens; ++t, sums += kLanes, y += y_stride)
    for (int64_t i = 0; i < count; ++i)
      y[i] = scale * sums[i] + bias[i];
}

template <int kTokens>
constexpr Variant variant() {
  return {1, micro_kernel<kTokens>, micro_kernel<kTokens>};
}

constexpr Kernels kKernels = {scale, build_tables, finish,
    {variant<1>(), variant<2>(), variant<3>(), variant<4>(), variant<5>(), variant<6>()}};

} // namespace scalar

#if MK_X86
// Eight lanes hold half a table: two permutations and a blend lose to the multiply-adds of
// masked_linear, so there is no kernel of its own.
namespace avx2 {
using scalar::kKernels;
}

namespace avx512 {

template <int kBlocks, int kTokens>
struct Sums {
  __m512 at[kBlocks][kTokens];
};

template <int kBlocks>
struct Indices {
  __m512i at[kBlocks];
};

// acc = or, if not the first, += what one table a token holds for each row.
template <bool kFirst, int kBlocks, int kTokens>
MK_AVX512 MK_INLINE void add_table(
    const Indices<kBlocks>& index, const float* tables, Sums<kBlocks, kTokens>& acc) {
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const __m512 sum_of = _mm512_load_ps(tables + t * kLanes);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 sum = _mm512_permutexvar_ps(index.at[b], sum_of); // by the low 4 bits of a lane
      acc.at[b][t] = kFirst ? sum : _mm512_add_ps(acc.at[b][t], sum);
    }
  }
}

// The same with the tables of one word of columns.
template <bool kFirst, int kBlocks, int kTokens>
MK_AVX512 MK_INLINE void add_word(
    const uint32_t* tiles, int64_t tile_stride, const float* tables, Sums<kBlocks, kTokens>& acc) {
  Indices<kBlocks> index;
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
    index.at[b] = _mm512_loadu_si512(tiles + b * tile_stride);
  add_table<kFirst>(index, tables, acc);
  // Unrolled, GCC looks everything up first and runs out of registers.
#pragma GCC unroll 1
  for (int64_t table = 1; table < kWordTables; ++table) {
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
      index.at[b] = _mm512_srli_epi32(index.at[b], kTableColumns);
    add_table<false>(index, tables + table * kTokens * kLanes, acc);
  }
}

template <int kBlocks, int kTokens>
MK_AVX512 void micro_kernel(
    const uint32_t* tiles, int64_t tile_stride, int64_t words, const float* tables, float* sums) {
  Sums<kBlocks, kTokens> total, acc;
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      total.at[b][t] = _mm512_load_ps(sums + (b * kTokens + t) * kLanes);

  constexpr int64_t kWordFloats = kWordTables * kTokens * kLanes;
  for (int64_t word = 0; word < words; word += 2) {
    // A total of short sums rounds less than one long sum, and starting one costs no addition.
    add_word<true>(tiles + word * kLanes, tile_stride, tables + word * kWordFloats, acc);
    if (word + 1 < words)
      add_word<false>(
          tiles + (word + 1) * kLanes, tile_stride, tables + (word + 1) * kWordFloats, acc);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        total.at[b][t] = _mm512_add_ps(total.at[b][t], acc.at[b][t]);
  }

#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      _mm512_store_ps(sums + (b * kTokens + t) * kLanes, total.at[b][t]);
}

MK_AVX512 void build_tables(const float* x, int64_t tokens, int64_t columns, float* tables) {
  for (int64_t k = 0; k < columns; k += kTableColumns)
    for (int64_t t = 0; t < tokens; ++t, tables += kLanes) {
      const float* four = x + t * columns + k;
      __m512 sums = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(four[0])); // subsets with column 0
      sums = _mm512_mask_add_ps(sums, 0xcccc, sums, _mm512_set1_ps(four[1]));
      sums = _mm512_mask_add_ps(sums, 0xf0f0, sums, _mm512_set1_ps(four[2]));
      sums = _mm512_mask_add_ps(sums, 0xff00, sums, _mm512_set1_ps(four[3]));
      _mm512_store_ps(tables, sums);
    }
}

MK_AVX512 void scale(const float* x, const float* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto lanes = static_cast<__mmask16>(low_bits(count - i));
    const __m512 product = _mm512_mul_ps(
        _mm512_maskz_loadu_ps(lanes, x + i), _mm512_maskz_loadu_ps(lanes, values + i));
    _mm512_mask_storeu_ps(out + i, lanes, product);
  }
}

MK_AVX512 void finish(const float* sums, int64_t tokens, float scale, const float* bias,
    int64_t count, float* y, int64_t y_stride) {
  const auto lanes = static_cast<__mmask16>(low_bits(count));
  const __m512 scales = _mm512_set1_ps(scale), added = _mm512_load_ps(bias);
  for (int64_t t = 0; t < tokens; ++t, sums += kLanes, y += y_stride)
    _mm512_mask_storeu_ps(y, lanes, _mm512_fmadd_ps(scales, _mm512_load_ps(sums), added));
}

template <int kBlocks, int kTokens>
constexpr Variant variant() {
  return {kBlocks, micro_kernel<kBlocks, kTokens>, micro_kernel<1, kTokens>};
}

constexpr Kernels kKernels = {scale, build_tables, finish,
    {variant<8, 1>(), variant<5, 2>(), variant<4, 3>(), variant<3, 4>(), variant<2, 5>(),
        variant<2, 6>()}};

} // namespace avx512
#endif

struct alignas(64) Vector {
  float lane[kLanes];
};

// Some blocks of rows that read the same values, with their biases [blocks, 16].
struct Tile {
  const float* values; // [cols]
  const uint32_t* words;
  int64_t first_row, count;
  std::vector<Vector> bias;

  Tile(const AlignedLinear& p, const AlignedRows& rows, const float* row_values, int64_t pattern,
      int64_t begin, int64_t end)
      : values(row_values),
        words(p.tiles + (rows.first_block(pattern) + begin) * words_per_row(p.cols) * kLanes),
        first_row(rows.row(pattern, begin * kLanes)),
        count(std::min((end - begin) * kLanes, rows.in_pattern(pattern) - begin * kLanes)),
        bias(end - begin) {
    for (int64_t i = 0; p.bias && i < count; ++i)
      bias[i / kLanes].lane[i % kLanes] = p.bias[first_row + i * p.patterns];
  }

  int64_t blocks() const { return static_cast<int64_t>(bias.size()); }
};

struct Workspace {
  std::vector<Vector> scaled, tables, sums;

  explicit Workspace(int64_t blocks)
      : scaled(kMaxTokens * kCachedWords * kWordBits / kLanes),
        tables(kMaxTokens * kCachedWords * kWordTables), sums(blocks * kMaxTokens) {}
};

// y of a tile's rows for some tokens, from sums [blocks, tokens, 16]
void store(const AlignedLinear& p, const Tile& tile, const Kernels& kernels, int64_t token,
    int64_t tokens, const Vector* sums) {
  for (int64_t block = 0; block < tile.blocks(); ++block, sums += tokens) {
    const float* bias = tile.bias[block].lane;
    const int64_t first = block * kLanes, count = std::min(kLanes, tile.count - first);
    float* out = p.y + token * p.rows + tile.first_row + first * p.patterns;
    if (p.patterns == 1) {
      kernels.finish(sums->lane, tokens, p.scale, bias, count, out, p.rows);
      continue;
    }
    Vector y[kMaxTokens];
    kernels.finish(sums->lane, tokens, p.scale, bias, kLanes, y->lane, kLanes);
    for (int64_t t = 0; t < tokens; ++t, out += p.rows)
      for (int64_t i = 0; i < count; ++i)
        out[i * p.patterns] = y[t].lane[i];
  }
}

void multiply_tile(const AlignedLinear& p, const Tile& tile, const Kernels& kernels, int64_t token,
    int64_t tokens, Workspace& space) {
  const Variant& variant = kernels.by_tokens[tokens - 1];
  float* scaled = space.scaled.front().lane;
  float* tables = space.tables.front().lane;
  std::fill_n(space.sums.begin(), tile.blocks() * tokens, Vector{});

  const int64_t words = words_per_row(p.cols), step = kCachedWords * kMaxTokens / tokens;
  for (int64_t word = 0; word < words; word += step) {
    const int64_t count = std::min(step, words - word);
    const int64_t col = word * kWordBits, columns = count * kWordBits;
    const int64_t there = std::min(columns, p.cols - col);
    for (int64_t t = 0; t < tokens; ++t) {
      float* out = scaled + t * columns;
      kernels.scale(p.x + (token + t) * p.cols + col, tile.values + col, there, out);
      std::fill(out + there, out + columns, 0.0f);
    }
    kernels.build_tables(scaled, tokens, columns, tables);
    for (int64_t block = 0; block < tile.blocks();) {
      const bool full = block + variant.blocks <= tile.blocks();
      (full ? variant.kernel : variant.single)(tile.words + (block * words + word) * kLanes,
          words * kLanes, count, tables, space.sums[block * tokens].lane);
      block += full ? variant.blocks : 1;
    }
  }
  store(p, tile, kernels, token, tokens, space.sums.data());
}

} // namespace

void aligned_tiles(
    const uint32_t* words, Shape shape, int64_t patterns, uint32_t* tiles, const Exec& exec) {
  const AlignedRows rows(shape.rows, patterns);
  const int64_t row_words = words_per_row(shape.cols);
  constexpr int64_t kGrain = 1 << 12; // words worth waking a thread for
  for (int64_t p = 0; p < patterns; ++p)
    exec.parallel.run(0, rows.blocks(p), ceil_div(kGrain, kLanes * row_words + 1),
        [&](int64_t begin, int64_t end) {
          for (int64_t block = begin; block < end; ++block) {
            uint32_t* tile = tiles + (rows.first_block(p) + block) * row_words * kLanes;
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              const int64_t row = rows.row(p, block * kLanes + lane);
              for (int64_t w = 0; w < row_words; ++w)
                tile[w * kLanes + lane] = row < shape.rows ? words[row * row_words + w] : 0;
            }
          }
        });
}

void aligned_linear(const AlignedLinear& p, const Exec& exec) {
  const Kernels& kernels = MK_BY_ISA(exec.isa, kKernels);
  const AlignedRows rows(p.rows, p.patterns);
  std::vector<float> first_row(p.period < p.cols ? p.cols : 0); // a short prototype, repeated
  for (int64_t k = 0; k < static_cast<int64_t>(first_row.size()); ++k)
    first_row[k] = p.values[k % p.period];

  // Blocks [begin, end) of all patterns, for some tokens. All patterns of a few tokens come before
  // the next tokens, so that the outputs they share stay in the cache.
  const auto multiply = [&](int64_t begin, int64_t end, int64_t token_begin, int64_t token_end) {
    std::vector<Tile> tiles;
    for (int64_t pattern = 0, first = 0; pattern < p.patterns && first < end; ++pattern) {
      const float* values = first_row.empty() ? p.values + pattern * p.cols : first_row.data();
      const int64_t last = first + rows.blocks(pattern);
      if (std::max(begin, first) < std::min(end, last))
        tiles.emplace_back(
            p, rows, values, pattern, std::max(begin, first) - first, std::min(end, last) - first);
      first = last;
    }
    Workspace space(end - begin);
    const int64_t all = token_end - token_begin, groups = ceil_div(all, kMaxTokens);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t token = token_begin + all * i / groups;
      const int64_t tokens = token_begin + all * (i + 1) / groups - token;
      for (const Tile& tile : tiles)
        multiply_tile(p, tile, kernels, token, tokens, space);
    }
  };

  // Threads share tokens, each building its own tables, or blocks when there are few tokens.
  constexpr int64_t kGrain = 1 << 18; // products worth waking a thread for
  const int64_t blocks = rows.all_blocks(), block = std::max<int64_t>(p.cols, 1) * kLanes;
  if (p.tokens >= 2 * kMaxTokens * exec.parallel.threads())
    exec.parallel.run(0, p.tokens, ceil_div(kGrain, blocks * block + 1),
        [&](int64_t begin, int64_t end) { multiply(0, blocks, begin, end); });
  else if (p.tokens > 0)
    exec.parallel.run(0, blocks, ceil_div(kGrain, p.tokens * block),
        [&](int64_t begin, int64_t end) { multiply(begin, end, 0, p.tokens); });
}

} // namespace masked_kernels
