// The CPU kernels. All arrays are dense, row-major and owned by the caller; none needs alignment
// beyond its element's. Weight element i (row-major) is values[i % period].
#pragma once

#include "masked_kernels/bits.h"
#include "masked_kernels/isa.h"
#include "masked_kernels/parallel.h"

#include <algorithm>
#include <variant>
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

// Where the threshold of a tensor's scores was, for the next selection to look there first. If it
// is of other scores, that costs time and changes no word.
struct LastCut {
  uint32_t key = 0; // in the order of scores.h
  int reach = -1;   // log2 of how far around the key to look; negative: nothing is known
};

struct SelectTopk {
  const float* scores;
  Shape shape;
  int64_t drop; // 0 .. rows * cols; clears the `drop` smallest, lower flat index first among equals
  bool absolute; // ranks |score|
  uint32_t* words;
  LastCut* last = nullptr; // read and updated where given
};
int64_t select_topk(const SelectTopk& params, const Exec& exec);

// The same for several tensors at once, which threads share: nans[i] = select_topk(params[i]).
void select_topk_many(const SelectTopk* params, int64_t count, int64_t* nans, const Exec& exec);

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
// rows * cols. With taps > 1 each row, [cols / taps, taps], is written as [taps, cols / taps]: the
// filters of a convolution in channels_last.
struct Decode {
  const void* values;
  int64_t period;
  int64_t element_size;
  const uint32_t* words; // of all rows
  int64_t cols;
  int64_t row_begin, row_end;
  void* out;
  int64_t taps = 1;
};
void decode(const Decode& params, const Exec& exec);

// What packed inference does to the outputs v [.., N] of a layer before they are stored:
// after.gain * activation(before.gain * v + before.shift) + after.shift + residual. Without gains
// they are stored as they are.
enum class Activation { identity, gelu, relu };

struct Affine {
  const float* gain; // [N]
  const float* shift;
};

struct Epilogue {
  Affine before = {};
  Affine after = {};
  Activation activation = Activation::identity;
  const float* residual = nullptr; // of the outputs' shape, or null

  explicit operator bool() const { return before.gain != nullptr; }
};

// y [rows, channels] = its epilogue, in place
void finish(const Epilogue& epilogue, int64_t rows, int64_t channels, float* y, const Exec& exec);

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

// Columns in a word of tiles: six times five, the bits that index a table of subset sums.
constexpr int64_t kTileColumns = 30;

// tiles [all blocks, ceil(cols / 30), 16] = the bits of each block, one lane a row, 0 for rows that
// are not there. With taps > 1 the columns, [cols / taps, taps], become [taps, cols / taps].
void aligned_tiles(const uint32_t* words, Shape shape, int64_t patterns, int64_t taps,
    uint32_t* tiles, const Exec& exec);

struct Interval {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// What a convolution of images [B, height, width, channels] multiplies: for each output pixel a
// patch [kernel_h, kernel_w, channels], 0 where there is no input.
struct Patches {
  int64_t height, width, channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  explicit operator bool() const { return kernel_h > 0; }
  int64_t floats() const { return kernel_h * kernel_w * channels; }
  int64_t per_image() const { return out_height * out_width; }

  // to [tokens, stride] = some channels of some patches
  void copy(const float* images, const Interval& tokens, const Interval& of, float* to,
      int64_t stride) const;
};

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
  Epilogue epilogue = {}; // instead of bias and scale, only with one pattern
  Patches patches = {};   // of images x that are the tokens; else x [M, K] is
};
void aligned_linear(const AlignedLinear& params, const Exec& exec);
bool can_be_in_place(const AlignedLinear& params, const Exec& exec); // whether y may be x

// As masked_linear, for many tokens; or a convolution.
struct PanelLinear {
  const float* x;
  const float* values;
  int64_t period;
  const uint32_t* words;
  const float* bias; // [N] or null
  float scale;
  int64_t tokens, rows, cols; // M, N, K
  float* y;
  Epilogue epilogue = {}; // instead of bias and scale
  Patches patches = {};   // of images x that are the tokens; else x [M, K] is
  // [N], of each row in `values`, where those are the `period` kept ones of a dense weight alone
  const int64_t* starts = nullptr;
};
void panel_linear(const PanelLinear& params, const Exec& exec);

// As masked_linear, for few tokens and a dense weight of which only what the mask keeps is there.
struct CompactLinear {
  const float* x;
  const float* kept; // [kept_count], row by row
  int64_t kept_count;
  const int64_t* starts; // [N], of each row in `kept`
  const uint32_t* words; // [N, ceil(K / 32)]
  const float* bias;     // [N] or null
  float scale;
  int64_t tokens, rows, cols; // M, N, K
  float* y;
};
void compact_linear(const CompactLinear& params, const Exec& exec);

// y [B, H', W', C] = epilogue of x [B, H, W, C] convolved with stride 1, each channel with a filter
// of its own
struct DepthwiseConv2d {
  const float* x;
  const float* values;
  int64_t period;
  const uint32_t* words; // [C, ceil(kh * kw / 32)]
  int64_t batch, channels, height, width;
  int64_t kernel_h, kernel_w, pad_h, pad_w; // no larger than the padded image
  float* y;
  Epilogue epilogue;

  int64_t out_height() const { return height + 2 * pad_h - kernel_h + 1; }
  int64_t out_width() const { return width + 2 * pad_w - kernel_w + 1; }
};
void depthwise_conv2d(const DepthwiseConv2d& params, const Exec& exec);
bool can_be_in_place(const DepthwiseConv2d& params, const Exec& exec); // whether y may be x

// y = convolutions of x in turn, each of what the one before has made.
struct MaskedConv2dChain {
  struct Step {
    // Of one image, with x, y and residual to be set.
    std::variant<DepthwiseConv2d, AlignedLinear, PanelLinear> conv;
    bool adds_input; // its residual is its x
    int64_t outputs; // floats of its y
  };
  const float* x; // [images, inputs]
  int64_t images, inputs;
  std::vector<Step> steps; // at least one
  float* y;                // [images, outputs of the last step]
};
void masked_conv2d_chain(const MaskedConv2dChain& params, const Exec& exec);

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

// n = weight * (v - mean) / sqrt(var + eps) + bias, of values v that come of x [pixels, channels].
struct BatchNorm {
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

// y = n + residual, v = GELU(x); residual [pixels, channels], or null
void gelu_batch_norm(const BatchNorm& params, const float* residual, float* y, const Exec& exec);

// The gradients of x, weight and bias. mean and var move with x where they are `of_batch`.
void gelu_batch_norm_grads(const BatchNorm& params, const float* grad_y, bool of_batch,
    float* grad_x, float* grad_weight, float* grad_bias, const Exec& exec);

// mean and biased variance of x [pixels, channels], pixels >= 1
void batch_norm_stats(
    const float* x, int64_t pixels, int64_t channels, float* mean, float* var, const Exec& exec);

// y = max(n + residual, 0), v = x; residual [pixels, channels], or null
void batch_norm_relu(const BatchNorm& params, const float* residual, float* y, const Exec& exec);

// As gelu_batch_norm_grads; grad_y is that of n where it `is_of_norm`, else that of max(n, 0).
void batch_norm_relu_grads(const BatchNorm& params, const float* grad_y, bool is_of_norm,
    bool of_batch, float* grad_x, float* grad_weight, float* grad_bias, const Exec& exec);

} // namespace masked_kernels
