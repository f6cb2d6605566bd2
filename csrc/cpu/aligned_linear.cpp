// y [M, N] = scale * x [M, K] (w . m)^T + bias for a prototype aligned with the rows: every row
// reads one of few value vectors v_0 .. v_{c-1}, row o reading v_{o % c}.
//
// Then the weight need not be multiplied at all: scale x by v_p, and each product is a sum of those
// x whose bit is set. Five columns have 32 such sums. A table of them fills two vector registers,
// and one permutation looks up five columns of 16 rows at once, 80 products that a fused
// multiply-add would need five instructions for. The sums are those of float32, nothing is rounded
// that a dot product would not round.
#include "epilogue.h"
#include "prefetch.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <vector>

namespace masked_kernels {
namespace {

constexpr int kMaxTokens = 6;
constexpr int64_t kLanes = AlignedRows::kBlock;
constexpr int64_t kTableColumns = 5, kSubsets = 1 << kTableColumns; // of a table
constexpr int64_t kWordTables = kTileColumns / kTableColumns;
constexpr int64_t kTableFloats = kTileColumns / kTableColumns * kSubsets; // of a word, per token
constexpr int64_t kCachedWords = 9; // of columns whose tables for kMaxTokens fit the L1 cache
// Words of columns that one running sum takes. A total of short sums rounds less than a long sum.
constexpr int64_t kRunWords = 3;

int64_t tile_words(int64_t cols) {
  return ceil_div(cols, kTileColumns);
}

// sums [blocks, tokens, 16] += the looked-up tables [words * 6, tokens, 32] (avx2: [words * 10,
// tokens, 8]) of `words` words of columns. A block's tile is [words, 16]; that of the next block
// lies `tile_stride` words on.
using MicroKernel = void (*)(const uint32_t* tiles, int64_t tile_stride, int64_t words,
    const float* tables, float* sums, const Ahead& y_ahead, const Ahead& x_ahead);

struct Variant {
  int blocks; // at once
  MicroKernel kernel;
  MicroKernel single; // for the blocks that remain
};

// The tables of `columns` columns from x [tokens, columns], columns a multiple of kTileColumns
using BuildTables = void (*)(const float* x, int64_t tokens, int64_t columns, float* tables);

// out [count] = x . values
using Scale = void (*)(const float* x, const float* values, int64_t count, float* out);

// The outputs of `rows` (at most 16) adjacent rows for some tokens.
struct Block {
  const AlignedLinear& p;
  int64_t token, tokens, row, rows;
  const float* sums; // [tokens, 16]
  const float* bias; // [16]

  // The first to y, with `stride` floats from token to token, as they leave the layer.
  template <int kLanes>
  MK_INLINE void store_to(float* y, int64_t stride) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < rows; i += kLanes) {
        const int64_t count = rows - i;
        Floats<kLanes> v =
            load<kLanes>(sums + t * AlignedRows::kBlock + i) * p.scale + load<kLanes>(bias + i);
        if (p.epilogue)
          v = finished<kLanes>(p.epilogue, v, row + i, (token + t) * p.rows + row + i, count);
        store<kLanes>(y + t * stride + i, v, count);
      }
  }
};
using Store = void (*)(const Block& block, float* y, int64_t stride);

struct Kernels {
  Scale scale;
  BuildTables build_tables;
  Store store;
  Variant by_tokens[kMaxTokens];
};

namespace scalar {

template <int kTokens>
void micro_kernel(const uint32_t* tile, int64_t, int64_t words, const float* tables, float* sums,
    const Ahead&, const Ahead&) {
  for (int64_t word = 0; word < words; ++word) {
    float acc[kTokens * kLanes] = {};
    for (int64_t table = 0; table < kWordTables; ++table, tables += kTokens * kSubsets)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t index = tile[word * kLanes + lane] >> table * kTableColumns & (kSubsets - 1);
        for (int t = 0; t < kTokens; ++t)
          acc[t * kLanes + lane] += tables[t * kSubsets + index];
      }
    for (int64_t i = 0; i < kTokens * kLanes; ++i)
      sums[i] += acc[i];
  }
}

void build_tables(const float* x, int64_t tokens, int64_t columns, float* tables) {
  for (int64_t k = 0; k < columns; k += kTableColumns)
    for (int64_t t = 0; t < tokens; ++t, tables += kSubsets)
      for (int64_t subset = 0; subset < kSubsets; ++subset) {
        tables[subset] = 0.0f;
        for (int64_t j = 0; j < kTableColumns; ++j)
          tables[subset] += subset >> j & 1 ? x[t * columns + k + j] : 0.0f;
      }
}

void scale(const float* x, const float* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = x[i] * values[i];
}

void store(const Block& block, float* y, int64_t stride) {
  block.store_to<4>(y, stride);
}

template <int kTokens>
constexpr Variant variant() {
  return {1, micro_kernel<kTokens>, micro_kernel<kTokens>};
}

constexpr Kernels kKernels = {scale, build_tables, store,
    {variant<1>(), variant<2>(), variant<3>(), variant<4>(), variant<5>(), variant<6>()}};

} // namespace scalar

#if MK_X86
// Eight lanes hold the 8 sums of 3 columns, and half a block.
namespace avx2 {

constexpr int64_t kHalf = kLanes / 2;
constexpr int64_t kColumns = 3, kTables = kTileColumns / kColumns;

// As in avx512, but the totals stay in memory: registers are few.
template <int kBlocks, int kTokens>
MK_AVX2 void micro_kernel(const uint32_t* tiles, int64_t tile_stride, int64_t words,
    const float* tables, float* sums, const Ahead& y_ahead, const Ahead& x_ahead) {
  y_ahead.fetch();
  x_ahead.fetch();
  for (int64_t word = 0; word < words; ++word, tiles += kLanes) {
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
        _mm256_store_ps(sum, _mm256_add_ps(_mm256_load_ps(sum), acc[b][t]));
      }
  }
}

// Lanes whose subset holds column j.
MK_AVX2 MK_INLINE __m256 subsets_with(int j) {
  const __m256i subset = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i bit = _mm256_set1_epi32(1 << j);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(subset, bit), bit));
}

MK_AVX2 void build_tables(const float* x, int64_t tokens, int64_t columns, float* tables) {
  const __m256 with[kColumns] = {subsets_with(0), subsets_with(1), subsets_with(2)};
  for (int64_t k = 0; k < columns; k += kColumns)
    for (int64_t t = 0; t < tokens; ++t, tables += kHalf) {
      const float* three = x + t * columns + k;
      __m256 sums = _mm256_setzero_ps();
      for (int64_t i = 0; i < kColumns; ++i)
        sums = _mm256_add_ps(sums, _mm256_and_ps(with[i], _mm256_set1_ps(three[i])));
      _mm256_store_ps(tables, sums);
    }
}

MK_AVX2 void store(const Block& block, float* y, int64_t stride) {
  block.store_to<8>(y, stride);
}

template <int kBlocks, int kTokens>
constexpr Variant variant() {
  return {kBlocks, micro_kernel<kBlocks, kTokens>, micro_kernel<1, kTokens>};
}

constexpr Kernels kKernels = {scalar::scale, build_tables, store,
    {variant<3, 1>(), variant<2, 2>(), variant<1, 3>(), variant<1, 4>(), variant<1, 5>(),
        variant<1, 6>()}};

} // namespace avx2

namespace avx512 {

// Running sums of kRunWords words at most, then added to `sums`.
template <int kBlocks, int kTokens>
MK_AVX512 MK_INLINE void add_run(
    const uint32_t* tiles, int64_t tile_stride, int64_t words, const float* tables, float* sums) {
  __m512 acc[kBlocks][kTokens] = {};
  for (int64_t word = 0; word < words; ++word, tiles += kLanes) {
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
        const __m512 high = _mm512_load_ps(tables + t * kSubsets + kLanes);
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
    for (int t = 0; t < kTokens; ++t, sums += kLanes)
      _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), acc[b][t]));
}

template <int kBlocks, int kTokens>
MK_AVX512 void micro_kernel(const uint32_t* tiles, int64_t tile_stride, int64_t words,
    const float* tables, float* sums, const Ahead& y_ahead, const Ahead& x_ahead) {
  for (int64_t word = 0; word < words; word += kRunWords) {
    y_ahead.share(word / kRunWords, ceil_div(words, kRunWords)).fetch();
    x_ahead.share(word / kRunWords, ceil_div(words, kRunWords)).fetch();
    add_run<kBlocks, kTokens>(tiles + word * kLanes, tile_stride, std::min(kRunWords, words - word),
        tables + word * kTokens * kTableFloats, sums);
  }
}

MK_AVX512 void build_tables(const float* x, int64_t tokens, int64_t columns, float* tables) {
  for (int64_t k = 0; k < columns; k += kTableColumns)
    for (int64_t t = 0; t < tokens; ++t, tables += kSubsets) {
      const float* five = x + t * columns + k;
      __m512 low = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(five[0])); // subsets with column 0
      low = _mm512_mask_add_ps(low, 0xcccc, low, _mm512_set1_ps(five[1]));
      low = _mm512_mask_add_ps(low, 0xf0f0, low, _mm512_set1_ps(five[2]));
      low = _mm512_mask_add_ps(low, 0xff00, low, _mm512_set1_ps(five[3]));
      _mm512_store_ps(tables, low);
      _mm512_store_ps(tables + kLanes, _mm512_add_ps(low, _mm512_set1_ps(five[4])));
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

MK_AVX512 void store(const Block& block, float* y, int64_t stride) {
  block.store_to<16>(y, stride);
}

template <int kBlocks, int kTokens>
constexpr Variant variant() {
  return {kBlocks, micro_kernel<kBlocks, kTokens>, micro_kernel<1, kTokens>};
}

constexpr Kernels kKernels = {scale, build_tables, store,
    {variant<8, 1>(), variant<8, 2>(), variant<6, 3>(), variant<4, 4>(), variant<4, 5>(),
        variant<4, 6>()}};

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
        words(p.tiles + (rows.first_block(pattern) + begin) * tile_words(p.cols) * kLanes),
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
      : scaled(ceil_div(kMaxTokens * kCachedWords * kTileColumns, kLanes)),
        tables(kMaxTokens * kCachedWords * kTableFloats / kLanes), sums(blocks * kMaxTokens) {}
};

// y of a tile's rows for some tokens, from sums [blocks, tokens, 16]
void store(const AlignedLinear& p, const Tile& tile, const Kernels& kernels, int64_t token,
    int64_t tokens, const Vector* sums) {
  for (int64_t block = 0; block < tile.blocks(); ++block, sums += tokens) {
    const int64_t first = block * kLanes, count = std::min(kLanes, tile.count - first);
    const int64_t row = tile.first_row + first * p.patterns;
    const Block results{p, token, tokens, row, count, sums->lane, tile.bias[block].lane};
    float* out = p.y + token * p.rows + row;
    if (p.patterns == 1) {
      kernels.store(results, out, p.rows);
      continue;
    }
    Vector y[kMaxTokens];
    kernels.store(results, y->lane, kLanes);
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

  const int64_t next = token + tokens, parts = ceil_div(tile.blocks(), variant.blocks);
  const Ahead y_ahead{p.y + token * p.rows, p.y + next * p.rows};
  const Ahead x_ahead{p.x + next * p.cols, p.x + std::min(next + tokens, p.tokens) * p.cols};
  constexpr Ahead nothing{nullptr, nullptr};
  const int64_t words = tile_words(p.cols), step = kCachedWords * kMaxTokens / tokens;
  for (int64_t word = 0; word < words; word += step) {
    const int64_t count = std::min(step, words - word);
    const int64_t col = word * kTileColumns, columns = count * kTileColumns;
    const int64_t there = std::min(columns, p.cols - col);
    for (int64_t t = 0; t < tokens; ++t) {
      float* out = scaled + t * columns;
      kernels.scale(p.x + (token + t) * p.cols + col, tile.values + col, there, out);
      std::fill(out + there, out + columns, 0.0f);
    }
    kernels.build_tables(scaled, tokens, columns, tables);
    const bool last = word + step >= words;
    for (int64_t block = 0; block < tile.blocks();) {
      const bool full = block + variant.blocks <= tile.blocks();
      const int64_t part = block / variant.blocks;
      (full ? variant.kernel : variant.single)(tile.words + (block * words + word) * kLanes,
          words * kLanes, count, tables, space.sums[block * tokens].lane,
          last ? y_ahead.share(part, parts) : nothing, last ? x_ahead.share(part, parts) : nothing);
      block += full ? variant.blocks : 1;
    }
  }
  store(p, tile, kernels, token, tokens, space.sums.data());
}

} // namespace

void aligned_tiles(
    const uint32_t* words, Shape shape, int64_t patterns, uint32_t* tiles, const Exec& exec) {
  const AlignedRows rows(shape.rows, patterns);
  const int64_t row_words = words_per_row(shape.cols), tile_row_words = tile_words(shape.cols);
  constexpr int64_t kGrain = 1 << 12; // words worth waking a thread for
  const auto columns_of = [&](const uint32_t* row, int64_t tile_word) {
    const int64_t word = tile_word * kTileColumns / kWordBits;
    const uint64_t next = word + 1 < row_words ? row[word + 1] : 0;
    const uint64_t both = next << kWordBits | row[word];
    return static_cast<uint32_t>(both >> tile_word * kTileColumns % kWordBits) &
           low_bits(kTileColumns);
  };
  for (int64_t p = 0; p < patterns; ++p)
    exec.parallel.run(0, rows.blocks(p), ceil_div(kGrain, kLanes * row_words + 1),
        [&](int64_t begin, int64_t end) {
          for (int64_t block = begin; block < end; ++block) {
            uint32_t* tile = tiles + (rows.first_block(p) + block) * tile_row_words * kLanes;
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              const int64_t row = rows.row(p, block * kLanes + lane);
              for (int64_t w = 0; w < tile_row_words; ++w)
                tile[w * kLanes + lane] =
                    row < shape.rows ? columns_of(words + row * row_words, w) : 0;
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
