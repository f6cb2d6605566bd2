// panel_linear of patches against loops in double, and masked_conv2d_chain against its steps one by
// one.
#include "testing.h"

#include <cmath>

using namespace testing;

namespace {

constexpr int64_t kHeight = 9, kWidth = 7;

// Gains and shifts [4, channels] and what becomes of the outputs.
struct Finishing {
  std::vector<float> affine;
  Activation activation;

  Finishing(int64_t channels, Random& random, Activation activation = Activation::relu)
      : affine(random.floats(4 * channels)), activation(activation) {}

  Epilogue epilogue() const {
    const float* rows = affine.data();
    const int64_t channels = affine.size() / 4;
    return {
        {rows, rows + channels}, {rows + 2 * channels, rows + 3 * channels}, activation, nullptr};
  }
};

struct Conv {
  int64_t channels, rows, kernel, stride, pad, dilation;

  Patches patches() const {
    const auto outputs = [&](int64_t size) {
      return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
    };
    return {kHeight, kWidth, channels, outputs(kHeight), outputs(kWidth), kernel, kernel, stride,
        stride, pad, pad, dilation, dilation};
  }
};

void test_patches(const Exec& exec, int64_t batch, const Conv& conv, Random& random) {
  const Patches patches = conv.patches();
  const Shape shape{conv.rows, patches.floats()};
  const std::vector<float> x = random.floats(batch * kHeight * kWidth * conv.channels);
  const std::vector<float> values = random.floats(17);
  const std::vector<uint32_t> words = random.words(shape);
  const Finishing finishing(conv.rows, random);
  std::vector<float> y(batch * patches.per_image() * conv.rows, NAN);
  const std::vector<float> residual = random.floats(y.size());
  PanelLinear p{x.data(), values.data(), 17, words.data(), nullptr, 1.0f,
      batch * patches.per_image(), conv.rows, shape.cols, y.data(), finishing.epilogue(), patches};
  p.epilogue.residual = residual.data();
  panel_linear(p, exec);
  const int64_t taps = conv.kernel * conv.kernel;
  for (int64_t at = 0; at < static_cast<int64_t>(y.size()); ++at) {
    const int64_t row = at % conv.rows, j = at / conv.rows % patches.out_width;
    const int64_t i = at / conv.rows / patches.out_width % patches.out_height;
    const int64_t image = at / conv.rows / patches.per_image();
    double sum = 0, size = 1;
    for (int64_t k = 0; k < shape.cols; ++k) { // [channels, kernel, kernel]
      const int64_t tap = k % taps;
      const int64_t from_row = i * conv.stride - conv.pad + tap / conv.kernel * conv.dilation;
      const int64_t from_col = j * conv.stride - conv.pad + tap % conv.kernel * conv.dilation;
      if (from_row < 0 || from_row >= kHeight || from_col < 0 || from_col >= kWidth ||
          !bit(words, shape, row, k))
        continue;
      const int64_t pixel = (image * kHeight + from_row) * kWidth + from_col;
      const double term =
          double{x[pixel * conv.channels + k / taps]} * values[(row * shape.cols + k) % 17];
      sum += term;
      size += std::abs(term);
    }
    const float* of = finishing.affine.data() + row;
    const double before = of[0] * sum + of[conv.rows];
    const double expected =
        of[2 * conv.rows] * std::max(before, 0.0) + of[3 * conv.rows] + residual[at];
    CHECK(std::abs(y[at] - expected) <= 1e-5 * size, name(exec.isa), exec.parallel.threads(), batch,
        conv.channels, conv.rows, conv.kernel, at, y[at], expected);
  }
}

// A chain against its steps one by one, of pixels of all channels.
void check_chain(const Exec& exec, MaskedConv2dChain chain) {
  const int64_t outputs = chain.steps.back().outputs;
  std::vector<float> y(chain.images * outputs, NAN);
  chain.y = y.data();
  masked_conv2d_chain(chain, exec);
  for (int64_t image = 0; image < chain.images; ++image) {
    std::vector<float> now(chain.x + image * chain.inputs, chain.x + (image + 1) * chain.inputs);
    float largest = 1; // of what any step makes, whose rounding the next ones pass on
    for (const MaskedConv2dChain::Step& step : chain.steps) {
      std::vector<float> next(step.outputs, NAN);
      const auto run = [&](auto conv, auto kernel) {
        conv.x = now.data(), conv.y = next.data();
        conv.epilogue.residual = step.adds_input ? now.data() : nullptr;
        kernel(conv, exec);
      };
      if (const auto* conv = std::get_if<DepthwiseConv2d>(&step.conv))
        run(*conv, depthwise_conv2d);
      else if (const auto* linear = std::get_if<AlignedLinear>(&step.conv))
        run(*linear, aligned_linear);
      else
        run(std::get<PanelLinear>(step.conv), panel_linear);
      now = next;
      for (const float value : now)
        largest = std::max(largest, std::abs(value));
    }
    for (int64_t i = 0; i < outputs; ++i) {
      const float got = y[image * outputs + i];
      CHECK(std::abs(got - now[i]) <= 1e-6 * largest, name(exec.isa), exec.parallel.threads(),
          chain.images, outputs, chain.steps.size(), image, i, got, now[i]);
    }
  }
}

// A convolution by panels, then blocks of a residual depthwise and a 1x1 or 3x3
// convolution, the last of them to `outputs`.
void test_chain(const Exec& exec, int64_t images, int64_t channels, int64_t outputs, int64_t side,
    Random& random) {
  constexpr int64_t kKernel = 3, kTaps = kKernel * kKernel;
  const std::vector<float> values = random.floats(channels * kTaps);
  const std::vector<float> x = random.floats(images * kHeight * kWidth * channels);
  const auto words = random.words({channels, kTaps});
  const Shape shape{outputs, channels * side * side}, square{channels, channels};
  const auto last_words = random.words(shape), square_words = random.words(square);
  const auto panel_words = random.words({channels, channels});
  const auto tiles_of = [&](const std::vector<uint32_t>& bits, Shape of, int64_t taps) {
    std::vector<uint32_t> tiles(AlignedRows(of.rows, 1).all_blocks() *
                                ceil_div(of.cols, kTileColumns) * AlignedRows::kBlock);
    aligned_tiles(bits.data(), of, 1, taps, tiles.data(), exec);
    return tiles;
  };
  const auto square_tiles = tiles_of(square_words, square, 1);
  const auto tiles = tiles_of(last_words, shape, side * side);
  const Finishing inner(channels, random), outer(outputs, random);

  const PanelLinear panels{nullptr, values.data(), channels * kTaps, panel_words.data(), nullptr,
      1.0f, kHeight * kWidth, channels, channels, nullptr, inner.epilogue(), {}};
  const DepthwiseConv2d depthwise{nullptr, values.data(), channels * kTaps, words.data(), 1,
      channels, kHeight, kWidth, kKernel, kKernel, 1, 1, nullptr, inner.epilogue()};
  const AlignedLinear pointwise{nullptr, values.data(), channels, 1, square_tiles.data(), nullptr,
      1.0f, kHeight * kWidth, channels, channels, nullptr, inner.epilogue(), {}};
  AlignedLinear last{nullptr, values.data(), channels * side * side, 1, tiles.data(), nullptr, 1.0f,
      kHeight * kWidth, outputs, shape.cols, nullptr, outer.epilogue(), {}};
  if (side > 1)
    last.patches = Conv{channels, outputs, side, 1, side / 2, 1}.patches();
  const int64_t pixels = kHeight * kWidth, inside = pixels * channels;
  MaskedConv2dChain chain{x.data(), images, inside,
      {{panels, false, inside}, {depthwise, true, inside}, {pointwise, true, inside},
          {depthwise, false, inside}, {last, false, pixels * outputs}},
      nullptr};

  check_chain(exec, chain);
}

// Blocks of a residual depthwise and a 1x1 convolution after a patch embedding. Where vectors are
// wide, those of whole vectors run in planes.
void test_blocks(const Exec& exec, int64_t images, int64_t channels, int64_t height, int64_t width,
    int64_t kernel, Random& random) {
  constexpr int64_t kInputs = 3, kPatch = 2, kBlocks = 2;
  const int64_t taps = kernel * kernel, inside = height * width * channels;
  const Shape square{channels, channels}, shape{channels, kInputs * kPatch * kPatch};
  const auto values = random.floats(channels), embedding = random.floats(shape.cols);
  const auto x = random.floats(images * height * width * kPatch * kPatch * kInputs);
  const auto tiles_of = [&](Shape of, int64_t taps) {
    std::vector<uint32_t> tiles(AlignedRows(of.rows, 1).all_blocks() *
                                ceil_div(of.cols, kTileColumns) * AlignedRows::kBlock);
    aligned_tiles(random.words(of).data(), of, 1, taps, tiles.data(), exec);
    return tiles;
  };
  const auto patch_tiles = tiles_of(shape, kPatch * kPatch);
  MaskedConv2dChain chain{x.data(), images, height * width * shape.cols, {}, nullptr};
  const Finishing first(channels, random);
  chain.steps.push_back(
      {AlignedLinear{nullptr, embedding.data(), shape.cols, 1, patch_tiles.data(), nullptr, 1.0f,
           height * width, channels, shape.cols, nullptr, first.epilogue(),
           {kPatch * height, kPatch * width, kInputs, height, width, kPatch, kPatch, kPatch, kPatch,
               0, 0, 1, 1}},
          false, inside});
  std::vector<std::vector<uint32_t>> words, tiles;
  std::vector<Finishing> finishing;
  for (int64_t i = 0; i < kBlocks; ++i) {
    words.push_back(random.words({channels, taps}));
    tiles.push_back(tiles_of(square, 1));
    finishing.emplace_back(channels, random, i == 0 ? Activation::gelu : Activation::identity);
  }
  for (int64_t i = 0; i < kBlocks; ++i) {
    const Epilogue epilogue = finishing[i].epilogue();
    chain.steps.push_back(
        {DepthwiseConv2d{nullptr, values.data(), channels, words[i].data(), 1, channels, height,
             width, kernel, kernel, kernel / 2, kernel / 2, nullptr, epilogue},
            i == 0, inside});
    chain.steps.push_back(
        {AlignedLinear{nullptr, values.data(), channels, 1, tiles[i].data(), nullptr, 1.0f,
             height * width, channels, channels, nullptr, epilogue, {}},
            i == 1, inside});
  }
  check_chain(exec, chain);
}

} // namespace

int main() {
  for_each_exec([](const Exec& exec) {
    Random random;
    for (const int64_t rows : {1, 15, 16, 17, 40})
      for (const int64_t batch : {0, 1, 3}) {
        test_patches(exec, batch, {3, rows, 2, 2, 0, 1}, random);
        test_patches(exec, batch, {3, rows, 3, 1, 1, 1}, random);
        test_patches(exec, batch, {5, rows, 1, 1, 0, 1}, random);
        test_patches(exec, batch, {2, rows, 3, 2, 3, 2}, random);
        test_patches(exec, batch, {33, rows, 3, 1, 0, 1}, random);
      }
    for (const int64_t images : {0, 1, 2, 3, 7})
      for (const int64_t channels : {16, 33})
        for (const int64_t outputs : {int64_t{8}, channels, int64_t{50}})
          for (const int64_t side : {1, 3})
            test_chain(exec, images, channels, outputs, side, random);
    for (const int64_t images : {1, 4})
      for (const int64_t kernel : {3, 5, 7, 9})
        for (const int64_t channels : {8, 33, 40, 104})
          for (const auto& [height, width] : {std::pair{1, 16}, {16, 16}, {17, 32}, {4, 20}})
            test_blocks(exec, images, channels, height, width, kernel, random);
  });
}
