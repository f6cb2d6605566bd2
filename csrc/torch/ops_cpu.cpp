// The CPU kernels as torch operators `masked_kernels_cpu::*`, on torch's stable ABI. Arguments are
// contiguous; backends/cpu sees to it. The checks here guard memory, not users.
#include "last_cuts.h"

#include "masked_kernels/kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace masked_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class TorchParallel final : public Parallel {
 public:
  int64_t threads() const override { return torch::stable::get_num_threads(); }

  void run(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) const override {
    torch::stable::parallel_for(begin, end, grain, fn);
  }
};

Exec exec() {
  static const TorchParallel parallel;
  return {active_isa(), parallel};
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds)
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_dense(const char* what, const Tensor& t, ScalarType dtype) {
  check(t.is_cpu(), what, ": not a CPU tensor");
  check(t.is_contiguous(), what, ": not contiguous");
  check(t.scalar_type() == dtype, what, ": dtype is ", toString(t.scalar_type()), ", expected ",
      toString(dtype));
}

Shape matrix(const char* what, const Tensor& t) {
  check(t.dim() == 2, what, ": ", t.dim(), " dimensions, expected 2");
  return {t.size(0), t.size(1)};
}

// The words of a mask with `cols` columns.
const uint32_t* words_of(const Tensor& words, int64_t cols) {
  check_dense("words", words, ScalarType::Int);
  const Shape shape = matrix("words", words);
  check(cols >= 0, "cols: got ", cols, ", expected at least 0");
  check(shape.cols == words_per_row(cols), "words: ", shape.cols, " words per row, expected ceil(",
      cols, "/32) = ", words_per_row(cols));
  return static_cast<const uint32_t*>(words.const_data_ptr());
}

uint32_t* new_words(Tensor& out) {
  return static_cast<uint32_t*>(out.mutable_data_ptr());
}

Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(size, dtype);
}

const float* floats_of(const char* what, const Tensor& t, int64_t count) {
  check_dense(what, t, ScalarType::Float);
  check(t.numel() == count, what, ": ", t.numel(), " elements, expected ", count);
  return t.const_data_ptr<float>();
}

// The pixels [B * H * W, C] of a channels_last image [B, C, H, W] of the size of `like`.
const float* pixels_of(const char* what, const Tensor& t, const Tensor& like) {
  check(t.is_cpu() && t.scalar_type() == ScalarType::Float, what, ": not a float CPU tensor");
  check(t.dim() == 4, what, ": ", t.dim(), " dimensions, expected 4");
  int64_t stride = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    check(t.size(dim) == like.size(dim), what, ": size of another image");
    check(
        t.size(dim) <= 1 || t.numel() == 0 || t.stride(dim) == stride, what, ": not channels_last");
    stride *= t.size(dim);
  }
  return t.const_data_ptr<float>();
}

float scale_of(const OptionalTensor& scale) {
  return scale ? *floats_of("scale", *scale, 1) : 1.0f;
}

// A weight needs values unless it has no elements; the kernels may then assume a period >= 1.
int64_t period_of(const Tensor& values, int64_t elements) {
  check(values.is_cpu() && values.is_contiguous(), "values: not a contiguous CPU tensor");
  check(values.numel() > 0 || elements == 0, "values: empty, but the weight has ", elements,
      " elements");
  return std::max<int64_t>(values.numel(), 1);
}

Tensor pack_op(const Tensor& mask) {
  check_dense("mask", mask, ScalarType::Bool);
  const Shape shape = matrix("mask", mask);
  Tensor words = empty({shape.rows, words_per_row(shape.cols)}, ScalarType::Int);
  pack(static_cast<const uint8_t*>(mask.const_data_ptr()), shape, new_words(words), exec());
  return words;
}

Tensor unpack_op(const Tensor& words, int64_t cols) {
  const uint32_t* bits = words_of(words, cols);
  const Shape shape{words.size(0), cols};
  Tensor mask = empty({shape.rows, cols}, ScalarType::Bool);
  unpack(bits, shape, static_cast<uint8_t*>(mask.mutable_data_ptr()), exec());
  return mask;
}

Tensor popcount_op(const Tensor& words) {
  const Shape shape = matrix("words", words);
  const uint32_t* bits = words_of(words, shape.cols * kWordBits);
  Tensor counts = empty({shape.rows}, ScalarType::Long);
  popcount(bits, {shape.rows, shape.cols * kWordBits}, counts.mutable_data_ptr<int64_t>(), exec());
  return counts;
}

Tensor transpose_op(const Tensor& words, int64_t cols) {
  const uint32_t* bits = words_of(words, cols);
  const Shape shape{words.size(0), cols};
  Tensor transposed = empty({cols, words_per_row(shape.rows)}, ScalarType::Int);
  transpose(bits, shape, new_words(transposed), exec());
  return transposed;
}

// The select ops return (words, flat index of the first NaN or -1).
using Selected = std::tuple<Tensor, int64_t>;

struct Scores {
  const float* data;
  Shape shape;
  Tensor words;
};

Scores scores_of(const Tensor& scores) {
  const Shape shape = matrix("scores", scores);
  return {floats_of("scores", scores, shape.elements()), shape,
      empty({shape.rows, words_per_row(shape.cols)}, ScalarType::Int)};
}

void check_drop(int64_t drop, Shape shape) {
  check(drop >= 0 && drop <= shape.elements(), "drop: got ", drop, ", expected 0 to ",
      shape.elements());
}

LastCuts last_cuts;

void forget_thresholds_op() {
  last_cuts.forget();
}

Selected select_topk_op(const Tensor& scores, int64_t drop, bool absolute) {
  Scores s = scores_of(scores);
  check_drop(drop, s.shape);
  SelectTopk params{s.data, s.shape, drop, absolute, new_words(s.words)};
  LastCut last = last_cuts.find(params);
  params.last = &last;
  const int64_t nan = select_topk(params, exec());
  last_cuts.put(params, last);
  return {s.words, nan};
}

// The words of all, then which of the tensors holds a NaN, and where, or -1.
std::tuple<std::vector<Tensor>, int64_t, int64_t> select_topk_many_op(
    const std::vector<Tensor>& scores, const std::vector<int64_t>& drops, bool absolute) {
  check(drops.size() == scores.size(), "drops: got ", drops.size(), " numbers for ", scores.size(),
      " tensors");
  std::vector<Tensor> words;
  std::vector<SelectTopk> params;
  std::vector<LastCut> last(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    Scores s = scores_of(scores[i]);
    check_drop(drops[i], s.shape);
    params.push_back({s.data, s.shape, drops[i], absolute, new_words(s.words), &last[i]});
    last[i] = last_cuts.find(params[i]);
    words.push_back(std::move(s.words));
  }
  std::vector<int64_t> nans(params.size());
  select_topk_many(params.data(), static_cast<int64_t>(params.size()), nans.data(), exec());
  for (size_t i = 0; i < params.size(); ++i)
    last_cuts.put(params[i], last[i]);
  const auto nan = std::find_if(nans.begin(), nans.end(), [](int64_t i) { return i >= 0; });
  if (nan == nans.end())
    return {words, -1, -1};
  return {words, nan - nans.begin(), *nan};
}

Selected select_threshold_op(const Tensor& scores, double threshold) {
  Scores s = scores_of(scores);
  const int64_t nan =
      select_threshold(s.data, s.shape, static_cast<float>(threshold), new_words(s.words), exec());
  return {s.words, nan};
}

Selected select_nm_op(const Tensor& scores, int64_t n, int64_t m, bool absolute) {
  Scores s = scores_of(scores);
  check(0 <= n && n <= m && m >= 1, "n, m: got ", n, " of ", m, ", expected 0 <= n <= m, m >= 1");
  const int64_t nan = select_nm({s.data, s.shape, n, m, absolute, new_words(s.words)}, exec());
  return {s.words, nan};
}

// Fills `out` with the weight's rows from `row` on, each [cols / taps, taps] transposed.
void decode_op(Tensor out, const Tensor& values, const Tensor& words, int64_t row, int64_t taps) {
  const Shape shape = matrix("out", out);
  check_dense("out", out, values.scalar_type());
  const uint32_t* bits = words_of(words, shape.cols);
  check(row >= 0 && row + shape.rows <= words.size(0), "out: rows ", row, " to ", row + shape.rows,
      " of a mask with ", words.size(0), " rows");
  const int64_t period = period_of(values, shape.elements());
  const auto size = static_cast<int64_t>(values.element_size());
  check(size == 2 || size == 4 || size == 8, "values: elements of ", size,
      " bytes, expected 2, 4 or 8");
  check(taps >= 1 && shape.cols % taps == 0, "taps: got ", taps, " for rows of ", shape.cols);
  check(taps == 1 || out.const_data_ptr() != values.const_data_ptr(), "out: is values");
  decode({values.const_data_ptr(), period, size, bits, shape.cols, row, row + shape.rows,
             out.mutable_data_ptr(), taps},
      exec());
}

Tensor masked_linear_op(const Tensor& x, const Tensor& values, const Tensor& words,
    const OptionalTensor& bias, const OptionalTensor& scale) {
  const Shape shape = matrix("x", x);
  const float* input = floats_of("x", x, shape.elements());
  const uint32_t* bits = words_of(words, shape.cols);
  const int64_t rows = words.size(0);
  const int64_t period = period_of(values, rows * shape.cols);
  const float* weights = floats_of("values", values, values.numel());
  const float* added = bias ? floats_of("bias", *bias, rows) : nullptr;
  Tensor y = empty({shape.rows, rows}, ScalarType::Float);
  masked_linear({input, weights, period, bits, added, scale_of(scale), shape.rows, rows, shape.cols,
                    y.mutable_data_ptr<float>()},
      exec());
  return y;
}

Tensor aligned_tiles_op(const Tensor& words, int64_t cols, int64_t patterns, int64_t taps) {
  const uint32_t* bits = words_of(words, cols);
  const Shape shape{words.size(0), cols};
  check(patterns >= 1, "patterns: got ", patterns, ", expected at least 1");
  check(taps >= 1 && cols % taps == 0, "taps: got ", taps, " for ", cols, " columns");
  const int64_t blocks = AlignedRows(shape.rows, patterns).all_blocks();
  Tensor tiles =
      empty({blocks, ceil_div(cols, kTileColumns), AlignedRows::kBlock}, ScalarType::Int);
  aligned_tiles(bits, shape, patterns, taps, new_words(tiles), exec());
  return tiles;
}

Activation activation_of(const std::string& name) {
  check(name == "identity" || name == "gelu" || name == "relu", "activation: got ", name,
      ", expected identity, gelu or relu");
  return name == "gelu"   ? Activation::gelu
         : name == "relu" ? Activation::relu
                          : Activation::identity;
}

// affine [4, channels] holds the gain and shift before and after the activation; residual has the
// shape of the outputs.
Epilogue epilogue_of(const Tensor& affine, const std::string& activation,
    const OptionalTensor& residual, int64_t outputs, int64_t channels) {
  const float* rows = floats_of("affine", affine, 4 * channels);
  return {{rows, rows + channels}, {rows + 2 * channels, rows + 3 * channels},
      activation_of(activation), residual ? floats_of("residual", *residual, outputs) : nullptr};
}

// Images [batch, height, width, channels].
struct Images {
  int64_t batch, height, width, channels;

  int64_t floats() const { return batch * height * width * channels; }
};

Images images_of(const Tensor& x) {
  check(x.dim() == 4, "x: ", x.dim(), " dimensions, expected 4");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

// What a convolution of images multiplies. Its geometry is kernel, stride, padding and dilation,
// height before width.
Patches patches_of(const Images& x, const std::vector<int64_t>& geometry) {
  check(geometry.size() == 8, "geometry: got ", geometry.size(), " numbers, expected 8");
  const int64_t* g = geometry.data();
  for (int i = 0; i < 8; ++i)
    check(g[i] >= (i / 2 == 2 ? 0 : 1), "geometry: got ", g[i], " at ", i);
  const auto outputs = [&](int64_t size, int i) {
    const int64_t spare = size + 2 * g[4 + i] - g[6 + i] * (g[i] - 1) - 1;
    check(spare >= 0, "x: smaller than the kernel");
    return spare / g[2 + i] + 1;
  };
  return {x.height, x.width, x.channels, outputs(x.height, 0), outputs(x.width, 1), g[0], g[1],
      g[2], g[3], g[4], g[5], g[6], g[7]};
}

// What a product multiplies: tokens [count, cols], or the patches of images.
struct Inputs {
  int64_t count, cols;
  Patches patches;
};

Inputs inputs_of(const Images& x, const std::vector<int64_t>& geometry) {
  const Patches patches = patches_of(x, geometry);
  const int64_t* g = geometry.data();
  const bool are_pixels = std::count(g, g + 4, 1) == 4 && g[4] == 0 && g[5] == 0;
  return {x.batch * patches.per_image(), patches.floats(), are_pixels ? Patches{} : patches};
}

// Of x [M, K], or of images [B, H, W, C] where there is a geometry.
Inputs inputs_of(const Tensor& x, const std::vector<int64_t>& geometry) {
  if (!geometry.empty())
    return inputs_of(images_of(x), geometry);
  const Shape shape = matrix("x", x);
  return {shape.rows, shape.cols, {}};
}

// x and y are to be set.
AlignedLinear aligned_of(
    const Inputs& inputs, const Tensor& values, const Tensor& tiles, int64_t rows) {
  const int64_t cols = inputs.cols, period = period_of(values, rows * cols);
  const int64_t patterns = std::max<int64_t>(period / std::max<int64_t>(cols, 1), 1);
  check(cols % period == 0 || period == patterns * cols, "values: period ", period,
      " does not align with rows of ", cols);
  check_dense("tiles", tiles, ScalarType::Int);
  const int64_t count =
      AlignedRows(rows, patterns).all_blocks() * ceil_div(cols, kTileColumns) * AlignedRows::kBlock;
  check(tiles.numel() == count, "tiles: ", tiles.numel(), " words, expected ", count);
  return {nullptr, floats_of("values", values, values.numel()), period, patterns,
      static_cast<const uint32_t*>(tiles.const_data_ptr()), nullptr, 1.0f, inputs.count, rows, cols,
      nullptr, {}, inputs.patches};
}

// x and y are to be set.
PanelLinear panel_of(const Inputs& inputs, const Tensor& values, const Tensor& words) {
  const uint32_t* bits = words_of(words, inputs.cols);
  const int64_t rows = words.size(0), period = period_of(values, rows * inputs.cols);
  return {nullptr, floats_of("values", values, values.numel()), period, bits, nullptr, 1.0f,
      inputs.count, rows, inputs.cols, nullptr, {}, inputs.patches};
}

Tensor aligned_linear_op(const Tensor& x, const Tensor& values, const Tensor& tiles, int64_t rows,
    const OptionalTensor& bias, const OptionalTensor& scale, const std::vector<int64_t>& geometry) {
  AlignedLinear params = aligned_of(inputs_of(x, geometry), values, tiles, rows);
  params.x = floats_of("x", x, x.numel());
  params.bias = bias ? floats_of("bias", *bias, rows) : nullptr;
  params.scale = scale_of(scale);
  Tensor y = empty({params.tokens, rows}, ScalarType::Float);
  params.y = y.mutable_data_ptr<float>();
  aligned_linear(params, exec());
  return y;
}

// y is to be set.
CompactLinear compact_of(const Tensor& x, const Tensor& kept, const Tensor& starts,
    const Tensor& words, const OptionalTensor& bias, const OptionalTensor& scale) {
  const Shape shape = matrix("x", x);
  const float* input = floats_of("x", x, shape.elements());
  const uint32_t* bits = words_of(words, shape.cols);
  const int64_t rows = words.size(0);
  check_dense("starts", starts, ScalarType::Long);
  check(starts.numel() == rows, "starts: ", starts.numel(), " rows, expected ", rows);
  return {input, floats_of("kept", kept, kept.numel()), kept.numel(),
      starts.const_data_ptr<int64_t>(), bits, bias ? floats_of("bias", *bias, rows) : nullptr,
      scale_of(scale), shape.rows, rows, shape.cols, nullptr};
}

Tensor compact_linear_op(const Tensor& x, const Tensor& kept, const Tensor& starts,
    const Tensor& words, const OptionalTensor& bias, const OptionalTensor& scale) {
  CompactLinear params = compact_of(x, kept, starts, words, bias, scale);
  Tensor y = empty({params.tokens, params.rows}, ScalarType::Float);
  params.y = y.mutable_data_ptr<float>();
  compact_linear(params, exec());
  return y;
}

Tensor compact_panel_linear_op(const Tensor& x, const Tensor& kept, const Tensor& starts,
    const Tensor& words, const OptionalTensor& bias, const OptionalTensor& scale) {
  const CompactLinear p = compact_of(x, kept, starts, words, bias, scale);
  Tensor y = empty({p.tokens, p.rows}, ScalarType::Float);
  panel_linear({p.x, p.kept, p.kept_count, p.words, p.bias, p.scale, p.tokens, p.rows, p.cols,
                   y.mutable_data_ptr<float>(), {}, {}, p.starts},
      exec());
  return y;
}

// aligned_linear with an epilogue, to y [tokens, rows].
void aligned_linear_fused_op(Tensor y, const Tensor& x, const Tensor& values, const Tensor& tiles,
    int64_t rows, const Tensor& affine, const std::string& activation,
    const OptionalTensor& residual, const std::vector<int64_t>& geometry) {
  AlignedLinear params = aligned_of(inputs_of(x, geometry), values, tiles, rows);
  params.x = floats_of("x", x, x.numel());
  check(params.patterns == 1, "values: ", params.patterns, " row patterns, expected 1");
  floats_of("y", y, params.tokens * rows);
  params.y = y.mutable_data_ptr<float>();
  params.epilogue = epilogue_of(affine, activation, residual, y.numel(), rows);
  aligned_linear(params, exec());
}

// x and y are to be set.
DepthwiseConv2d depthwise_of(const Images& x, const Tensor& values, const Tensor& words,
    int64_t kernel_h, int64_t kernel_w, int64_t pad_h, int64_t pad_w) {
  check(kernel_h >= 1 && kernel_w >= 1 && pad_h >= 0 && pad_w >= 0, "kernel, padding: got ",
      kernel_h, "x", kernel_w, ", ", pad_h, "x", pad_w, ", expected at least 1 and 0");
  const int64_t taps = kernel_h * kernel_w;
  check(words.dim() == 2 && words.size(0) == x.channels, "words: expected ", x.channels, " rows");
  const DepthwiseConv2d params{nullptr, floats_of("values", values, values.numel()),
      period_of(values, x.channels * taps), words_of(words, taps), x.batch, x.channels, x.height,
      x.width, kernel_h, kernel_w, pad_h, pad_w, nullptr, {}};
  check(params.out_height() >= 1 && params.out_width() >= 1, "x: smaller than the kernel");
  return params;
}

// x and y are [B, H, W, C].
void depthwise_fused_op(Tensor y, const Tensor& x, const Tensor& values, const Tensor& words,
    int64_t kernel_h, int64_t kernel_w, int64_t pad_h, int64_t pad_w, const Tensor& affine,
    const std::string& activation, const OptionalTensor& residual) {
  const Images images = images_of(x);
  DepthwiseConv2d params = depthwise_of(images, values, words, kernel_h, kernel_w, pad_h, pad_w);
  const Images out{images.batch, params.out_height(), params.out_width(), images.channels};
  floats_of("y", y, out.floats());
  params.x = floats_of("x", x, x.numel());
  params.y = y.mutable_data_ptr<float>();
  params.epilogue = epilogue_of(affine, activation, residual, y.numel(), out.channels);
  depthwise_conv2d(params, exec());
}

Tensor panel_linear_op(const Tensor& x, const Tensor& values, const Tensor& words,
    const OptionalTensor& bias, const OptionalTensor& scale, const std::vector<int64_t>& geometry) {
  PanelLinear params = panel_of(inputs_of(x, geometry), values, words);
  params.x = floats_of("x", x, x.numel());
  params.bias = bias ? floats_of("bias", *bias, params.rows) : nullptr;
  params.scale = scale_of(scale);
  Tensor y = empty({params.tokens, params.rows}, ScalarType::Float);
  params.y = y.mutable_data_ptr<float>();
  panel_linear(params, exec());
  return y;
}

// panel_linear with an epilogue, to y [tokens, rows].
void panel_linear_fused_op(Tensor y, const Tensor& x, const Tensor& values, const Tensor& words,
    const Tensor& affine, const std::string& activation, const OptionalTensor& residual,
    const std::vector<int64_t>& geometry) {
  PanelLinear params = panel_of(inputs_of(x, geometry), values, words);
  params.x = floats_of("x", x, x.numel());
  floats_of("y", y, params.tokens * params.rows);
  params.y = y.mutable_data_ptr<float>();
  params.epilogue = epilogue_of(affine, activation, residual, y.numel(), params.rows);
  panel_linear(params, exec());
}

// What one of the convolutions of a chain is: its kernel, by the number that conv2d_chain.py gives
// it, whether the input is added, and the geometry.
struct StepNumbers {
  static constexpr size_t kCount = 10;
  enum Kernel : int64_t { depthwise, aligned, panels } kernel;
  bool adds_input;
  std::vector<int64_t> geometry;

  explicit StepNumbers(const int64_t* from)
      : kernel(static_cast<Kernel>(from[0])), adds_input(from[1]),
        geometry(from + 2, from + kCount) {}
};

// Step of a chain on one image of the size `at`, which becomes that of its outputs. `bits` are
// words, or tiles for the aligned kernel.
MaskedConv2dChain::Step step_of(Images& at, const Tensor& values, const Tensor& bits,
    const Tensor& affine, const std::string& activation, const StepNumbers& step) {
  const int64_t rows = affine.numel() / 4, inputs = at.floats();
  const std::vector<int64_t>& g = step.geometry;
  const Patches patches = patches_of(at, g);
  const auto finished = [&](auto conv) {
    conv.epilogue = epilogue_of(affine, activation, {}, 0, rows);
    return conv;
  };
  MaskedConv2dChain::Step made{{}, step.adds_input, patches.per_image() * rows};
  switch (step.kernel) {
  case StepNumbers::depthwise:
    check(rows == at.channels, "affine: ", rows, " channels, expected ", at.channels);
    check(std::count(g.begin() + 2, g.begin() + 4, 1) + std::count(g.begin() + 6, g.end(), 1) == 4,
        "numbers: a stride or dilation that the depthwise kernel does not have");
    made.conv = finished(depthwise_of(at, values, bits, g[0], g[1], g[4], g[5]));
    break;
  case StepNumbers::aligned:
    made.conv = finished(aligned_of(inputs_of(at, g), values, bits, rows));
    check(std::get<AlignedLinear>(made.conv).patterns == 1, "values: several row patterns");
    break;
  case StepNumbers::panels:
    made.conv = finished(panel_of(inputs_of(at, g), values, bits));
    check(bits.size(0) == rows, "affine: ", rows, " channels, expected ", bits.size(0));
    break;
  default:
    check(false, "numbers: got kernel ", int64_t{step.kernel});
  }
  check(!made.adds_input || made.outputs == inputs, "x: its size changes in a residual step");
  at = {1, patches.out_height, patches.out_width, rows};
  return made;
}

// A chain whose steps are known, for images of one size. To read its steps from the arguments takes
// as long as a small layer, so they are read once; Python holds what was read as the bytes of a
// tensor, which owns it.
struct PreparedChain {
  MaskedConv2dChain chain; // but for x, y and the number of images
  Images in, out;          // of one image
  std::vector<Tensor> held;
  const PreparedChain* self = this; // not so in a copy of the bytes

  static const PreparedChain& of(const Tensor& bytes) {
    check(bytes.scalar_type() == ScalarType::Byte && bytes.numel() == sizeof(PreparedChain),
        "chain: got a tensor that prepare_chain did not make");
    const auto* prepared = static_cast<const PreparedChain*>(bytes.const_data_ptr());
    check(prepared->self == prepared, "chain: got a copy of what prepare_chain made");
    return *prepared;
  }
};

// x [B, H, W, C], of which only the size of an image counts; numbers are those of StepNumbers, of
// each step.
Tensor prepare_chain_op(const Tensor& x, const std::vector<Tensor>& values,
    const std::vector<Tensor>& bits, const std::vector<Tensor>& affines,
    const std::vector<std::string>& activations, const std::vector<int64_t>& numbers) {
  const size_t count = values.size();
  check(count > 0 && bits.size() == count && affines.size() == count &&
            activations.size() == count && numbers.size() == StepNumbers::kCount * count,
      "values: ", count, " steps, which other arguments do not have");
  auto prepared = std::make_unique<PreparedChain>();
  Images at = images_of(x);
  at.batch = 1;
  prepared->in = at;
  prepared->chain = {nullptr, 0, at.floats(), {}, nullptr};
  for (size_t i = 0; i < count; ++i) {
    prepared->chain.steps.push_back(step_of(at, values[i], bits[i], affines[i], activations[i],
        StepNumbers(&numbers[i * StepNumbers::kCount])));
    prepared->held.insert(prepared->held.end(), {values[i], bits[i], affines[i]});
  }
  prepared->out = at;
  Tensor bytes = torch::stable::from_blob(prepared.get(), {sizeof(PreparedChain)}, {1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
      [](void* owned) { delete static_cast<PreparedChain*>(owned); });
  prepared.release();
  return bytes;
}

// x and the result are [B, H, W, C].
Tensor masked_conv2d_chain_op(const Tensor& x, const Tensor& prepared) {
  const PreparedChain& known = PreparedChain::of(prepared);
  const Images &in = known.in, &out = known.out, images = images_of(x);
  check(images.height == in.height && images.width == in.width && images.channels == in.channels,
      "x: images of ", images.height, "x", images.width, "x", images.channels, ", expected ",
      in.height, "x", in.width, "x", in.channels);
  Tensor y = empty({images.batch, out.height, out.width, out.channels}, ScalarType::Float);
  MaskedConv2dChain chain = known.chain;
  chain.x = floats_of("x", x, x.numel());
  chain.images = images.batch;
  chain.y = y.mutable_data_ptr<float>();
  masked_conv2d_chain(chain, exec());
  return y;
}

void finish_op(
    Tensor y, const Tensor& affine, const std::string& activation, const OptionalTensor& residual) {
  const Shape shape = matrix("y", y);
  floats_of("y", y, shape.elements());
  finish(epilogue_of(affine, activation, residual, shape.elements(), shape.cols), shape.rows,
      shape.cols, y.mutable_data_ptr<float>(), exec());
}

void scored_grad_op(
    Tensor grad, const Tensor& values, const OptionalTensor& scores, const OptionalTensor& scale) {
  const int64_t count = grad.numel();
  floats_of("grad", grad, count);
  const float* signs = scores ? floats_of("scores", *scores, count) : nullptr;
  const int64_t period = period_of(values, count);
  scored_grad({grad.mutable_data_ptr<float>(), floats_of("values", values, values.numel()), period,
                  signs, scale_of(scale), count},
      exec());
}

// grad_y [B, H', W', C] and x [B, H, W, C] to [C, kernel, kernel]
Tensor depthwise_grad_op(
    const Tensor& grad_y, const Tensor& x, int64_t kernel, int64_t pad_h, int64_t pad_w) {
  check(x.dim() == 4, "x: ", x.dim(), " dimensions, expected 4");
  check(DepthwiseGrad::serves(kernel), "kernel: got ", kernel, ", expected 3, 5, 7 or 9");
  DepthwiseGrad params{nullptr, floats_of("x", x, x.numel()), x.size(0), x.size(3), x.size(1),
      x.size(2), kernel, pad_h, pad_w, nullptr};
  check(pad_h >= 0 && pad_w >= 0 && params.out_height() > 0 && params.out_width() > 0,
      "padding: got ", pad_h, ", ", pad_w, " for ", params.height, "x", params.width, " pixels");
  params.grad_y = floats_of(
      "grad_y", grad_y, params.batch * params.out_height() * params.out_width() * params.channels);
  Tensor grad_weight = empty({params.channels, kernel, kernel}, ScalarType::Float);
  params.grad_weight = grad_weight.mutable_data_ptr<float>();
  depthwise_grad(params, exec());
  return grad_weight;
}

// x [B, C, H, W] channels_last; stats [2, C] are mean and biased variance
BatchNorm norm_of(const Tensor& x, const Tensor& stats, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps) {
  const int64_t channels = x.dim() == 4 ? x.size(1) : 0;
  const float* mean = floats_of("stats", stats, 2 * channels);
  return {pixels_of("x", x, x), x.numel() / std::max<int64_t>(channels, 1), channels, mean,
      mean + channels, weight ? floats_of("weight", *weight, channels) : nullptr,
      bias ? floats_of("bias", *bias, channels) : nullptr, static_cast<float>(eps)};
}

// Mean and biased variance, [2, C], by gelu_stats or batch_norm_stats.
template <class Stats>
Tensor stats_of(const Stats& run, const Tensor& x) {
  const float* pixels = pixels_of("x", x, x);
  check(x.numel() > 0, "x: no pixels");
  const int64_t channels = x.size(1);
  Tensor stats = empty({2, channels}, ScalarType::Float);
  float* mean = stats.mutable_data_ptr<float>();
  run(pixels, x.numel() / channels, channels, mean, mean + channels, exec());
  return stats;
}

Tensor gelu_stats_op(const Tensor& x) {
  return stats_of(gelu_stats, x);
}

// By gelu_batch_norm or batch_norm_relu.
template <class Run>
Tensor normalised_by(const Run& run, const Tensor& x, const Tensor& stats,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    double eps) {
  const BatchNorm params = norm_of(x, stats, weight, bias, eps);
  Tensor y = torch::stable::empty_like(x);
  run(params, residual ? pixels_of("residual", *residual, x) : nullptr, y.mutable_data_ptr<float>(),
      exec());
  return y;
}

Tensor gelu_batch_norm_op(const Tensor& x, const Tensor& stats, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, double eps) {
  return normalised_by(gelu_batch_norm, x, stats, weight, bias, residual, eps);
}

// The gradients of x and, [2, C], of weight and bias, by run(grad_y, grad_x, grad_weight,
// grad_bias).
template <class Run>
std::tuple<Tensor, Tensor> grads_by(
    const Run& run, const Tensor& grad_y, const Tensor& x, int64_t channels) {
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_affine = empty({2, channels}, ScalarType::Float);
  float* grad_weight = grad_affine.mutable_data_ptr<float>();
  run(pixels_of("grad_y", grad_y, x), grad_x.mutable_data_ptr<float>(), grad_weight,
      grad_weight + channels);
  return {grad_x, grad_affine};
}

std::tuple<Tensor, Tensor> gelu_batch_norm_grads_op(const Tensor& grad_y, const Tensor& x,
    const Tensor& stats, const OptionalTensor& weight, bool of_batch, double eps) {
  const BatchNorm params = norm_of(x, stats, weight, std::nullopt, eps);
  const auto run = [&](const float* of_y, float* of_x, float* of_weight, float* of_bias) {
    gelu_batch_norm_grads(params, of_y, of_batch, of_x, of_weight, of_bias, exec());
  };
  return grads_by(run, grad_y, x, params.channels);
}

Tensor batch_norm_stats_op(const Tensor& x) {
  return stats_of(batch_norm_stats, x);
}

Tensor batch_norm_relu_op(const Tensor& x, const Tensor& stats, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, double eps) {
  return normalised_by(batch_norm_relu, x, stats, weight, bias, residual, eps);
}

std::tuple<Tensor, Tensor> batch_norm_relu_grads_op(const Tensor& grad_y, const Tensor& x,
    const Tensor& stats, const OptionalTensor& weight, const OptionalTensor& bias, bool is_of_norm,
    bool of_batch, double eps) {
  const BatchNorm params = norm_of(x, stats, weight, bias, eps);
  const auto run = [&](const float* of_y, float* of_x, float* of_weight, float* of_bias) {
    batch_norm_relu_grads(params, of_y, is_of_norm, of_batch, of_x, of_weight, of_bias, exec());
  };
  return grads_by(run, grad_y, x, params.channels);
}

std::string isa_op() {
  return name(active_isa());
}

} // namespace

STABLE_TORCH_LIBRARY(masked_kernels_cpu, m) {
  m.def("isa() -> str");
  m.def("pack(Tensor mask) -> Tensor");
  m.def("unpack(Tensor words, int cols) -> Tensor");
  m.def("popcount(Tensor words) -> Tensor");
  m.def("transpose(Tensor words, int cols) -> Tensor");
  m.def("select_topk(Tensor scores, int drop, bool absolute) -> (Tensor, int)");
  m.def("select_topk_many(Tensor[] scores, int[] drops, bool absolute) -> (Tensor[], int, int)");
  m.def("forget_thresholds() -> ()");
  m.def("select_threshold(Tensor scores, float threshold) -> (Tensor, int)");
  m.def("select_nm(Tensor scores, int n, int m, bool absolute) -> (Tensor, int)");
  m.def("decode_(Tensor(a!) out, Tensor values, Tensor words, int row, int taps=1) -> ()");
  m.def("masked_linear(Tensor x, Tensor values, Tensor words, Tensor? bias, Tensor? scale) -> "
        "Tensor");
  m.def("aligned_tiles(Tensor words, int cols, int patterns, int taps) -> Tensor");
  m.def("aligned_linear(Tensor x, Tensor values, Tensor tiles, int rows, Tensor? bias, "
        "Tensor? scale, int[] geometry) -> Tensor");
  m.def("compact_linear(Tensor x, Tensor kept, Tensor starts, Tensor words, Tensor? bias, "
        "Tensor? scale) -> Tensor");
  m.def("compact_panel_linear(Tensor x, Tensor kept, Tensor starts, Tensor words, Tensor? bias, "
        "Tensor? scale) -> Tensor");
  m.def("aligned_linear_fused_(Tensor(a!) y, Tensor x, Tensor values, Tensor tiles, int rows, "
        "Tensor affine, str activation, Tensor? residual, int[] geometry) -> ()");
  m.def("depthwise_fused_(Tensor(a!) y, Tensor x, Tensor values, Tensor words, int kernel_h, "
        "int kernel_w, int pad_h, int pad_w, Tensor affine, str activation, Tensor? residual) -> "
        "()");
  m.def("panel_linear(Tensor x, Tensor values, Tensor words, Tensor? bias, Tensor? scale, "
        "int[] geometry) -> Tensor");
  m.def("panel_linear_fused_(Tensor(a!) y, Tensor x, Tensor values, Tensor words, Tensor affine, "
        "str activation, Tensor? residual, int[] geometry) -> ()");
  m.def("prepare_chain(Tensor x, Tensor[] values, Tensor[] bits, Tensor[] affines, "
        "str[] activations, int[] numbers) -> Tensor");
  m.def("masked_conv2d_chain(Tensor x, Tensor chain) -> Tensor");
  m.def("finish_(Tensor(a!) y, Tensor affine, str activation, Tensor? residual) -> ()");
  m.def("scored_grad_(Tensor(a!) grad, Tensor values, Tensor? scores, Tensor? scale) -> ()");
  m.def("gelu_stats(Tensor x) -> Tensor");
  m.def("gelu_batch_norm(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, "
        "float eps) -> Tensor");
  m.def("gelu_batch_norm_grads(Tensor grad_y, Tensor x, Tensor stats, Tensor? weight, "
        "bool of_batch, float eps) -> (Tensor, Tensor)");
  m.def("batch_norm_stats(Tensor x) -> Tensor");
  m.def("batch_norm_relu(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, "
        "float eps) -> Tensor");
  m.def("batch_norm_relu_grads(Tensor grad_y, Tensor x, Tensor stats, Tensor? weight, "
        "Tensor? bias, bool is_of_norm, bool of_batch, float eps) -> (Tensor, Tensor)");
  m.def("depthwise_grad(Tensor grad_y, Tensor x, int kernel, int pad_h, int pad_w) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(masked_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa_op));
  m.impl("forget_thresholds", TORCH_BOX(&forget_thresholds_op));
  m.impl("select_topk_many", TORCH_BOX(&select_topk_many_op)); // a list may be empty: no CPU key
}

STABLE_TORCH_LIBRARY_IMPL(masked_kernels_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_op));
  m.impl("unpack", TORCH_BOX(&unpack_op));
  m.impl("popcount", TORCH_BOX(&popcount_op));
  m.impl("transpose", TORCH_BOX(&transpose_op));
  m.impl("select_topk", TORCH_BOX(&select_topk_op));
  m.impl("select_threshold", TORCH_BOX(&select_threshold_op));
  m.impl("select_nm", TORCH_BOX(&select_nm_op));
  m.impl("decode_", TORCH_BOX(&decode_op));
  m.impl("masked_linear", TORCH_BOX(&masked_linear_op));
  m.impl("aligned_tiles", TORCH_BOX(&aligned_tiles_op));
  m.impl("aligned_linear", TORCH_BOX(&aligned_linear_op));
  m.impl("compact_linear", TORCH_BOX(&compact_linear_op));
  m.impl("compact_panel_linear", TORCH_BOX(&compact_panel_linear_op));
  m.impl("aligned_linear_fused_", TORCH_BOX(&aligned_linear_fused_op));
  m.impl("depthwise_fused_", TORCH_BOX(&depthwise_fused_op));
  m.impl("panel_linear", TORCH_BOX(&panel_linear_op));
  m.impl("panel_linear_fused_", TORCH_BOX(&panel_linear_fused_op));
  m.impl("prepare_chain", TORCH_BOX(&prepare_chain_op));
  m.impl("masked_conv2d_chain", TORCH_BOX(&masked_conv2d_chain_op));
  m.impl("finish_", TORCH_BOX(&finish_op));
  m.impl("scored_grad_", TORCH_BOX(&scored_grad_op));
  m.impl("gelu_stats", TORCH_BOX(&gelu_stats_op));
  m.impl("gelu_batch_norm", TORCH_BOX(&gelu_batch_norm_op));
  m.impl("gelu_batch_norm_grads", TORCH_BOX(&gelu_batch_norm_grads_op));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats_op));
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu_op));
  m.impl("batch_norm_relu_grads", TORCH_BOX(&batch_norm_relu_grads_op));
  m.impl("depthwise_grad", TORCH_BOX(&depthwise_grad_op));
}

} // namespace masked_kernels
