// The CPU kernels. All arrays are dense, row-major and owned by the caller; none needs alignment
// beyond its element's. Weight element i (row-major) is values[i % period].
#pragma once

#include "masked_kernels/bits.h"
#include "masked_kernels/isa.h"
#include "masked_kernels/parallel.h"

#include <algorithm>
#include <vector>

namespace masked_kernels {

// Where a kernel runs.
struct Exec {
  Isa isa;
  const Parallel& parallel;
};

// words = the bytes of mask [rows, cols] that are not 0.
void pack(const uint8_t* mask, Shape shape, uint32_t* words, const Exec& exec);

// mask [rows, cols] = 1 where the bit is set, else 0.
void unpack(const uint32_t* words, Shape shape, uint8_t* mask, const Exec& exec);

// counts [rows] = set bits of each row.
void popcount(const uint32_t* words, Shape shape, int64_t* counts, const Exec& exec);

// transposed [cols, ceil(rows / 32)] = the words of the transposed mask.
void transpose(const uint32_t* words, Shape shape, uint32_t* transposed, const Exec& exec);

// The select kernels turn scores [rows, cols] into words and return the flat index of the first NaN
// (the words are then unspecified) or -1. -0.0 equals +0.0.

struct SelectTopk {
  const float* scores;
  Shape shape;
  int64_t drop; // 0 .. rows * cols; clears the `drop` smallest, lower flat index first among equals
  bool absolute; // ranks |score|
  uint32_t* words;
};
int64_t select_topk(const SelectTopk& params, const Exec& exec);

struct SelectNM {
  const float* scores;
  Shape shape;
  int64_t n, m;  // keeps the n largest of every m columns, higher column first among equals
  bool absolute; // ranks |score|
  uint32_t* words;
};
int64_t select_nm(const SelectNM& params, const Exec& exec);

// bit = score > threshold
int64_t select_threshold(
    const float* scores, Shape shape, float threshold, uint32_t* words, const Exec& exec);

// out [row_end - row_begin, cols] = the weight's rows where the bit is set, else 0. Moves bits
// only, so it serves every dtype of 2, 4 or 8 bytes. `out` may be `values` itself when period is
// rows * cols.
struct Decode {
  const void* values;
  int64_t period;
  int64_t element_size;
  const uint32_t* words; // of all rows
  int64_t cols;
  int64_t row_begin, row_end;
  void* out;
};
void decode(const Decode& params, const Exec& exec);

// y [M, N] = scale * x [M, K] (w . m)^T + bias
struct MaskedLinear {
  const float* x;
  const float* values;
  int64_t period;
  const uint32_t* words; // [N, ceil(K / 32)]
  const float* bias;     // [N] or null
  float scale;
  int64_t tokens, rows, cols; // M, N, K
  float* y;
};
void masked_linear(const MaskedLinear& params, const Exec& exec);

// The rows of a weight by the value vector they read: row o has pattern o % patterns. The rows of
// one pattern are cut into blocks of 16.
class AlignedRows {
 public:
  static constexpr int64_t kBlock = 16;

  AlignedRows(int64_t rows, int64_t patterns) : rows_(rows), patterns_(patterns) {}

  int64_t in_pattern(int64_t pattern) const {
    return ceil_div(std::max<int64_t>(rows_ - pattern, 0), patterns_);
  }
  int64_t blocks(int64_t pattern) const { return ceil_div(in_pattern(pattern), kBlock); }
  int64_t first_block(int64_t pattern) const {
    int64_t count = 0;
    for (int64_t p = 0; p < pattern; ++p)
      count += blocks(p);
    return count;
  }
  int64_t all_blocks() const { return first_block(patterns_); }
  int64_t row(int64_t pattern, int64_t index) const { return pattern + index * patterns_; }

 private:
  int64_t rows_, patterns_;
};

// tiles [all blocks, ceil(cols / 32), 16] = the words of each block, one lane a row, 0 for rows
// that are not there
void aligned_tiles(
    const uint32_t* words, Shape shape, int64_t patterns, uint32_t* tiles, const Exec& exec);

// As masked_linear, for a period that divides K (patterns = 1) or is patterns * K.
struct AlignedLinear {
  const float* x;
  const float* values;
  int64_t period, patterns;
  const uint32_t* tiles; // of aligned_tiles
  const float* bias;     // [N] or null
  float scale;
  int64_t tokens, rows, cols; // M, N, K
  float* y;
};
void aligned_linear(const AlignedLinear& params, const Exec& exec);

// A row of a weight and where it starts in the prototype.
struct PhasedRow {
  int64_t row; // -1 for none
  int64_t start;

  int64_t phase() const { return start % 16; } // in a cache line of the prototype
};

// How phased_linear reads a mask: rows in groups of 4 that share their phase, and 64 columns at a
// time, the first of which lies `phase` columns before the row.
struct PhasedLayout {
  static constexpr int64_t kGroup = 4, kChunk = 64;

  static constexpr int64_t chunks(int64_t cols) { return ceil_div(cols + 15, kChunk); }
  // The prototype must go on for so many values past its end.
  static constexpr int64_t padded(int64_t period, int64_t cols) {
    return period + chunks(cols) * kChunk;
  }
};

// The rows of all groups; those of a group start near one another.
std::vector<PhasedRow> phased_rows(Shape shape, int64_t period);

// tiles [groups, chunks, 4] = the bits of each group of `rows`, 0 outside of a row
void phased_tiles(const uint32_t* words, Shape shape, const std::vector<PhasedRow>& rows,
    uint64_t* tiles, const Exec& exec);

// As masked_linear, for any period.
struct PhasedLinear {
  const float* x;
  const float* values; // on a boundary of 64 bytes, PhasedLayout::padded of them
  const uint64_t* tiles;
  const PhasedRow* phased_rows;
  int64_t groups;
  const float* bias; // [N] or null
  float scale;
  int64_t tokens, rows, cols; // M, N, K
  float* y;
};
void phased_linear(const PhasedLinear& params, const Exec& exec);

// As masked_linear, for a dense weight of which only what the mask keeps is there.
struct CompactLinear {
  const float* x;
  const float* kept;     // row by row
  const int64_t* starts; // [N], of each row in `kept`
  const uint32_t* words; // [N, ceil(K / 32)]
  const float* bias;     // [N] or null
  float scale;
  int64_t tokens, rows, cols; // M, N, K
  float* y;
};
void compact_linear(const CompactLinear& params, const Exec& exec);

// grad[i] *= scale * values[i % period] * (scores ? sign(scores[i]) : 1), in place
struct ScoredGrad {
  float* grad;
  const float* values;
  int64_t period;
  const float* scores; // null when the rule ranks signed scores
  float scale;
  int64_t count;
};
void scored_grad(const ScoredGrad& params, const Exec& exec);

// grad_weight [channels, kernel, kernel] of a depthwise convolution with stride 1
struct DepthwiseGrad {
  const float* grad_y; // [batch, out_height, out_width, channels]
  const float* x;      // [batch, height, width, channels]
  int64_t batch, channels, height, width;
  int64_t kernel; // one that serves() names
  int64_t pad_h, pad_w;
  float* grad_weight;

  static constexpr bool serves(int64_t kernel) {
    return kernel == 3 || kernel == 5 || kernel == 7 || kernel == 9;
  }
  int64_t out_height() const { return height + 2 * pad_h - kernel + 1; }
  int64_t out_width() const { return width + 2 * pad_w - kernel + 1; }
};
void depthwise_grad(const DepthwiseGrad& params, const Exec& exec);

// BatchNorm of g = GELU(x), x [pixels, channels]:
// y = weight * (g - mean) / sqrt(var + eps) + bias + residual.
struct GeluBatchNorm {
  const float* x;
  int64_t pixels, channels;
  const float* mean;   // [channels], as all that follow
  const float* var;    // biased
  const float* weight; // null for 1
  const float* bias;   // null for 0
  float eps;
};

// mean and biased variance of GELU(x), x [pixels, channels], pixels >= 1
void gelu_stats(
    const float* x, int64_t pixels, int64_t channels, float* mean, float* var, const Exec& exec);

// residual [pixels, channels], or null
void gelu_batch_norm(
    const GeluBatchNorm& params, const float* residual, float* y, const Exec& exec);

// The gradients of weight and bias: sums over pixels of grad_y * (g - mean) / sqrt(var + eps) and
// of grad_y.
void gelu_batch_norm_grad_affine(const GeluBatchNorm& params, const float* grad_y,
    float* grad_weight, float* grad_bias, const Exec& exec);

// Where mean and var are those of the batch, grad_x needs the gradients of weight and bias; where
// they are constants, these are null.
void gelu_batch_norm_grad_x(const GeluBatchNorm& params, const float* grad_y,
    const float* grad_weight, const float* grad_bias, float* grad_x, const Exec& exec);

} // namespace masked_kernels
