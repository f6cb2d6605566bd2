// y [M, N] = scale * x [M, K] (w . m)^T + bias for a prototype of any period.
//
// A row starts anywhere in the prototype, so its values lie across cache lines, and loading them
// takes as long as two multiply-adds. Here rows are sorted by their phase, their distance from a
// line's start. All rows of a phase read whole lines when x is moved by the phase instead; the bits
// were moved beforehand, in phased_tiles.
#include "target.h"

#include "masked_kernels/kernels.h"

#include <numeric>

namespace masked_kernels {
namespace {

constexpr int kRows = PhasedLayout::kGroup, kMaxTokens = 6;
constexpr int64_t kLanes = 16, kChunk = PhasedLayout::kChunk;

// Where the rows of a group have their values, on cache lines.
struct Values {
  const float* of[kRows];
};

// sums [kRows, tokens] = products of `chunks` chunks. x is packed in vectors of 16 columns
// [4 * chunks, tokens, 16].
using MicroKernel = void (*)(
    const Values& values, const uint64_t* tiles, const float* x, int64_t chunks, float* sums);

struct Kernels {
  MicroKernel by_tokens[kMaxTokens];
};

namespace scalar {

template <int kTokens>
void micro_kernel(
    const Values& values, const uint64_t* tiles, const float* x, int64_t chunks, float* sums) {
  float acc[kRows][kTokens][kLanes] = {};
  for (int64_t k = 0; k < chunks * kChunk; k += kLanes, x += kTokens * kLanes)
    for (int r = 0; r < kRows; ++r) {
      const uint64_t bits = tiles[k / kChunk * kRows + r] >> k % kChunk;
      for (int t = 0; t < kTokens; ++t)
        for (int64_t j = 0; j < kLanes; ++j)
          acc[r][t][j] += bits >> j & 1 ? values.of[r][k + j] * x[t * kLanes + j] : 0.0f;
    }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t)
      sums[r * kTokens + t] = std::accumulate(acc[r][t], acc[r][t] + kLanes, 0.0f);
}

constexpr Kernels kKernels = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>, micro_kernel<4>,
    micro_kernel<5>, micro_kernel<6>};

} // namespace scalar

#if MK_X86
// Without mask registers, bits cost more than the lines save: linear.cpp has the kernel for AVX2.
namespace avx2 {
using scalar::kKernels;
}

namespace avx512 {

template <int kTokens>
MK_AVX512 void micro_kernel(
    const Values& values, const uint64_t* tiles, const float* x, int64_t chunks, float* sums) {
  __m512 acc[kRows][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      acc[r][t] = _mm512_setzero_ps();

  for (int64_t chunk = 0; chunk < chunks; ++chunk, tiles += kRows) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kChunk; i += kLanes, x += kTokens * kLanes) {
      __m512 xs[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        xs[t] = _mm512_load_ps(x + t * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __mmask16 set = _cvtu32_mask16(static_cast<uint32_t>(tiles[r] >> i));
        const __m512 w = _mm512_load_ps(values.of[r] + chunk * kChunk + i);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
          acc[r][t] = _mm512_mask3_fmadd_ps(w, xs[t], acc[r][t], set);
      }
    }
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sums[r * kTokens + t] = _mm512_reduce_add_ps(acc[r][t]);
}

constexpr Kernels kKernels = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>, micro_kernel<4>,
    micro_kernel<5>, micro_kernel<6>};

} // namespace avx512
#endif

// Columns [col, col + count) of some tokens, 0 where there is no column.
void pack_tokens(const PhasedLinear& p, int64_t token, int64_t tokens, int64_t col, int64_t count,
    float* packed) {
  for (int64_t k = col; k < col + count; k += kLanes)
    for (int64_t t = token; t < token + tokens; ++t, packed += kLanes) {
      const float* x = p.x + t * p.cols;
      if (k >= 0 && k + kLanes <= p.cols)
        std::copy_n(x + k, kLanes, packed);
      else
        for (int64_t j = 0; j < kLanes; ++j)
          packed[j] = k + j >= 0 && k + j < p.cols ? x[k + j] : 0.0f;
    }
}

// The outputs of groups [group_begin, group_end) for some tokens.
struct Tile {
  int64_t group_begin, group_end, token_begin, token_end;
};

void multiply_tile(const PhasedLinear& p, const Tile& tile, const Kernels& kernels) {
  constexpr int64_t kCached = 12288; // elements of x to keep in the L1 cache
  struct alignas(64) Vector {
    float lane[kLanes];
  };
  std::vector<Vector> packed(kCached / kLanes);
  float* x = packed.front().lane;

  const int64_t chunks = PhasedLayout::chunks(p.cols);
  const int64_t tokens = tile.token_end - tile.token_begin;
  const int64_t token_blocks = ceil_div(tokens, kMaxTokens);
  const int64_t block = kCached / ceil_div(tokens, token_blocks) / kChunk;
  for (int64_t chunk = 0; chunk < chunks; chunk += block) {
    const int64_t count = std::min(block, chunks - chunk);
    for (int64_t i = 0; i < token_blocks; ++i) {
      const int64_t token = tile.token_begin + tokens * i / token_blocks;
      const int64_t width = tile.token_begin + tokens * (i + 1) / token_blocks - token;
      int64_t packed_phase = -1;
      for (int64_t group = tile.group_begin; group < tile.group_end; ++group) {
        const PhasedRow* rows = p.phased_rows + group * kRows;
        const int64_t phase = rows->phase();
        if (phase != packed_phase)
          pack_tokens(p, token, width, chunk * kChunk - phase, count * kChunk, x);
        packed_phase = phase;

        Values values;
        for (int r = 0; r < kRows; ++r)
          values.of[r] = p.values + rows[r].start - phase + chunk * kChunk;
        float sums[kRows * kMaxTokens];
        kernels.by_tokens[width - 1](
            values, p.tiles + (group * chunks + chunk) * kRows, x, count, sums);
        for (int r = 0; r < kRows && rows[r].row >= 0; ++r)
          for (int64_t t = 0; t < width; ++t) {
            float& y = p.y[(token + t) * p.rows + rows[r].row];
            const float before = chunk > 0 ? y : p.bias ? p.bias[rows[r].row] : 0.0f;
            y = p.scale * sums[r * width + t] + before;
          }
      }
    }
  }
}

// The 64 bits of a row from column `col` on, which may lie before its first.
uint64_t bits_from(const uint32_t* words, int64_t row_words, int64_t col) {
  const int64_t word = col >= 0 ? col / kWordBits : -1, shift = col - word * kWordBits;
  const auto at = [&](int64_t w) { return uint64_t{w >= 0 && w < row_words ? words[w] : 0}; };
  const uint64_t low = at(word) | at(word + 1) << kWordBits;
  return shift == 0 ? low : low >> shift | at(word + 2) << (kChunk - shift);
}

} // namespace

std::vector<PhasedRow> phased_rows(Shape shape, int64_t period) {
  std::vector<PhasedRow> rows(shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row)
    rows[row] = {row, row * shape.cols % period};
  std::stable_sort(rows.begin(), rows.end(), [](const PhasedRow& a, const PhasedRow& b) {
    return std::make_pair(a.phase(), a.start) < std::make_pair(b.phase(), b.start);
  });
  std::vector<PhasedRow> grouped;
  for (const PhasedRow& row : rows) {
    while (grouped.size() % kRows != 0 && grouped.back().phase() != row.phase())
      grouped.push_back({-1, grouped.back().start});
    grouped.push_back(row);
  }
  while (grouped.size() % kRows != 0)
    grouped.push_back({-1, grouped.back().start});
  return grouped;
}

void phased_tiles(const uint32_t* words, Shape shape, const std::vector<PhasedRow>& rows,
    uint64_t* tiles, const Exec& exec) {
  const int64_t row_words = words_per_row(shape.cols), chunks = PhasedLayout::chunks(shape.cols);
  const auto groups = static_cast<int64_t>(rows.size()) / kRows;
  constexpr int64_t kGrain = 1 << 11; // chunks worth waking a thread for
  exec.parallel.run(0, groups, ceil_div(kGrain, chunks * kRows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kRows; i < end * kRows; ++i) {
      uint64_t* tile = tiles + i / kRows * chunks * kRows + i % kRows;
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        tile[chunk * kRows] = rows[i].row < 0 ? 0
                                              : bits_from(words + rows[i].row * row_words,
                                                    row_words, chunk * kChunk - rows[i].phase());
    }
  });
}

void phased_linear(const PhasedLinear& p, const Exec& exec) {
  const Kernels& kernels = MK_BY_ISA(exec.isa, kKernels);
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  const int64_t work = kRows * std::max<int64_t>(p.cols, 1);
  if (p.tokens == 0)
    return;
  // Threads share groups, or tokens when there are too few groups.
  if (p.groups >= 4 * exec.parallel.threads() || p.groups >= p.tokens)
    exec.parallel.run(0, p.groups, ceil_div(kGrain, p.tokens * work),
        [&](int64_t begin, int64_t end) { multiply_tile(p, {begin, end, 0, p.tokens}, kernels); });
  else
    exec.parallel.run(0, p.tokens, ceil_div(kGrain, p.groups * work + 1),
        [&](int64_t begin, int64_t end) { multiply_tile(p, {0, p.groups, begin, end}, kernels); });
}

} // namespace masked_kernels
