// masked_linear, panel_linear, aligned_linear and compact_linear against loops in double, and the
// order of its rows.
#include "testing.h"

#include "row_walk.h"

#include <cmath>

using namespace testing;

namespace {

struct Problem {
  int64_t tokens;
  Shape shape;
  int64_t period;
  std::vector<float> x, values, bias;
  std::vector<uint32_t> words;
  float scale;

  Problem(int64_t tokens, Shape shape, int64_t period, bool has_bias, Random& random)
      : tokens(tokens), shape(shape), period(period), x(random.floats(tokens * shape.cols)),
        values(random.floats(period)), bias(random.floats(has_bias ? shape.rows : 0)),
        words(random.words(shape)), scale(has_bias ? 1.5f : 1.0f) {}

  const float* bias_or_null() const { return bias.empty() ? nullptr : bias.data(); }

  void check(const std::vector<float>& y, const Exec& exec) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t row = 0; row < shape.rows; ++row) {
        double sum = 0, size = 1;
        for (int64_t col = 0; col < shape.cols; ++col)
          if (bit(words, shape, row, col)) {
            const double term =
                double{x[t * shape.cols + col]} * values[(row * shape.cols + col) % period];
            sum += term;
            size += std::abs(term);
          }
        const double expected = scale * sum + (bias.empty() ? 0 : bias[row]);
        CHECK(std::abs(y[t * shape.rows + row] - expected) <= 1e-6 * scale * size, name(exec.isa),
            exec.parallel.threads(), tokens, shape.rows, shape.cols, period, t, row,
            y[t * shape.rows + row], expected);
      }
  }
};

void test_linear(
    const Exec& exec, int64_t tokens, Shape shape, int64_t period, bool has_bias, Random& random) {
  const Problem p(tokens, shape, period, has_bias, random);
  std::vector<float> y(tokens * shape.rows, NAN);
  masked_linear({p.x.data(), p.values.data(), period, p.words.data(), p.bias_or_null(), p.scale,
                    tokens, shape.rows, shape.cols, y.data()},
      exec);
  p.check(y, exec);
}

void test_panels(
    const Exec& exec, int64_t tokens, Shape shape, int64_t period, bool has_bias, Random& random) {
  const Problem p(tokens, shape, period, has_bias, random);
  std::vector<float> y(tokens * shape.rows, NAN);
  panel_linear({p.x.data(), p.values.data(), period, p.words.data(), p.bias_or_null(), p.scale,
                   tokens, shape.rows, shape.cols, y.data()},
      exec);
  p.check(y, exec);
}

void test_aligned(
    const Exec& exec, int64_t tokens, Shape shape, int64_t period, bool has_bias, Random& random) {
  const Problem p(tokens, shape, period, has_bias, random);
  const int64_t patterns = std::max<int64_t>(period / std::max<int64_t>(shape.cols, 1), 1);
  std::vector<uint32_t> tiles(AlignedRows(shape.rows, patterns).all_blocks() *
                              ceil_div(shape.cols, kTileColumns) * AlignedRows::kBlock);
  aligned_tiles(p.words.data(), shape, patterns, 1, tiles.data(), exec);
  std::vector<float> y(tokens * shape.rows, NAN);
  aligned_linear({p.x.data(), p.values.data(), period, patterns, tiles.data(), p.bias_or_null(),
                     p.scale, tokens, shape.rows, shape.cols, y.data()},
      exec);
  p.check(y, exec);
}

// Patches of images as tokens; a geometry of which no two sides can be confused.
void test_patches(const Exec& exec, int64_t channels, int64_t rows, Random& random) {
  constexpr int64_t kBatch = 2, kHeight = 5, kWidth = 7, kOutHeight = 3, kOutWidth = 5;
  constexpr int64_t kKernelWidth = 3, kTaps = 2 * kKernelWidth, kStride = 2, kPad = 1;
  const Patches patches{
      kHeight, kWidth, channels, kOutHeight, kOutWidth, 2, kKernelWidth, kStride, 1, kPad, 0, 1, 1};
  const Shape shape{rows, channels * kTaps};
  Problem p(kBatch * kOutHeight * kOutWidth, shape, shape.cols, false, random);
  const std::vector<float> images = random.floats(kBatch * kHeight * kWidth * channels);
  std::vector<float> by_tap(shape.cols);
  for (int64_t k = 0; k < shape.cols; ++k) {
    const int64_t channel = k / kTaps, tap = k % kTaps;
    by_tap[tap * channels + channel] = p.values[k];
    for (int64_t token = 0; token < p.tokens; ++token) {
      const int64_t out_row = token / kOutWidth, image = out_row / kOutHeight;
      const int64_t row = out_row % kOutHeight * kStride + tap / kKernelWidth - kPad;
      const int64_t column = token % kOutWidth + tap % kKernelWidth;
      const int64_t pixel = (image * kHeight + row) * kWidth + column;
      const bool inside = 0 <= row && row < kHeight;
      p.x[token * shape.cols + k] = inside ? images[pixel * channels + channel] : 0.0f;
    }
  }
  std::vector<uint32_t> tiles(
      AlignedRows(rows, 1).all_blocks() * ceil_div(shape.cols, kTileColumns) * AlignedRows::kBlock);
  aligned_tiles(p.words.data(), shape, 1, kTaps, tiles.data(), exec);
  std::vector<float> y(p.tokens * rows, NAN);
  aligned_linear({images.data(), by_tap.data(), shape.cols, 1, tiles.data(), nullptr, p.scale,
                     p.tokens, rows, shape.cols, y.data(), {}, patches},
      exec);
  p.check(y, exec);

  y.assign(y.size(), NAN);
  panel_linear({images.data(), p.values.data(), shape.cols, p.words.data(), nullptr, p.scale,
                   p.tokens, rows, shape.cols, y.data(), {}, patches},
      exec);
  p.check(y, exec);
}

void test_compact(const Exec& exec, int64_t tokens, Shape shape, bool has_bias, Random& random) {
  const Problem p(tokens, shape, std::max<int64_t>(shape.elements(), 1), has_bias, random);
  std::vector<float> kept; // no more memory than there are values
  std::vector<int64_t> starts;
  for (int64_t row = 0; row < shape.rows; ++row) {
    starts.push_back(kept.size());
    for (int64_t col = 0; col < shape.cols; ++col)
      if (bit(p.words, shape, row, col))
        kept.push_back(p.values[row * shape.cols + col]);
  }
  kept.shrink_to_fit();
  std::vector<float> y(tokens * shape.rows, NAN);
  compact_linear(
      {p.x.data(), kept.data(), static_cast<int64_t>(kept.size()), starts.data(), p.words.data(),
          p.bias_or_null(), p.scale, tokens, shape.rows, shape.cols, y.data()},
      exec);
  p.check(y, exec);

  y.assign(y.size(), NAN);
  panel_linear(
      {p.x.data(), kept.data(), static_cast<int64_t>(kept.size()), p.words.data(), p.bias_or_null(),
          p.scale, tokens, shape.rows, shape.cols, y.data(), {}, {}, starts.data()},
      exec);
  p.check(y, exec);
}

// A value whose bit is 0 counts for nothing, whatever it is.
void test_masked_out_infinity(const Exec& exec) {
  const float x[2] = {1.0f, 2.0f}, values[2] = {INFINITY, 3.0f};
  const uint32_t word = 2;
  float y = 0;
  masked_linear({x, values, 2, &word, nullptr, 1.0f, 1, 1, 2, &y}, exec);
  CHECK(y == 6.0f, name(exec.isa), y);
}

void test_walk(int64_t begin, int64_t end, int64_t cols, int64_t period) {
  std::vector<int> visits(end);
  for (RowWalk walk(begin, end, cols, period); !walk.done(); walk.advance()) {
    ++visits.at(walk.row());
    CHECK(walk.start() == walk.row() * cols % period, walk.row(), walk.start());
  }
  for (int64_t row = 0; row < end; ++row)
    CHECK(visits[row] == (row >= begin), begin, end, cols, period, row);
}

} // namespace

int main() {
  CHECK(RowWalk::best_stride(4096, 4096, 167773) == 41, "random padding, 1e-2 of 4096 x 4096");
  CHECK(RowWalk::best_stride(4096, 4096, 4096 * 4096) == 1, "dense");
  CHECK(RowWalk::best_stride(4096, 4096, 4096) == 1, "equal rows");
  for (const int64_t period : {1, 3, 100, 4099, 167773, 1 << 24})
    for (const int64_t cols : {1, 64, 1000, 4096})
      for (const int64_t begin : {0, 17})
        for (const int64_t end : {17, 18, 400})
          test_walk(begin, end, cols, period);

  for_each_exec([](const Exec& exec) {
    test_masked_out_infinity(exec);
    Random random;
    for (const int64_t cols : kCols) {
      const Shape shape{13, cols};
      for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 13})
        for (const int64_t period : {int64_t{1}, int64_t{3}, cols / 2 + 1, cols, cols + 1,
                 2 * cols - 1, shape.elements(), shape.elements() + 9})
          test_linear(exec, tokens, shape, period, tokens % 2 == 0, random);
    }
    for (const int64_t cols : kCols)
      for (const int64_t rows : {0, 1, 4, 13})
        for (const int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 13})
          test_compact(exec, tokens, {rows, cols}, tokens % 2 == 0, random);
    test_compact(exec, 9, {200, 1300}, true, random); // panels of several blocks, in several turns
    for (const int64_t cols : kCols)
      for (const int64_t rows : {1, 16, 37, 150})
        for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 41})
          for (const int64_t period :
              {int64_t{1}, cols % 2 ? cols : cols / 2, cols, 2 * cols, 7 * cols, 200 * cols})
            test_aligned(exec, tokens, {rows, cols}, period, tokens % 2 == 0, random);
    for (const int64_t channels : {1, 5, 32, 70, 200}) // of 200, panels take two blocks
      for (const int64_t rows : {1, 16, 37})
        test_patches(exec, channels, rows, random);
    // Several column blocks; nothing.
    test_aligned(exec, 1, {200, 13'001}, 13'001, true, random);
    test_aligned(exec, 9, {40, 5000}, 10'000, false, random);
    for (const Shape empty : {Shape{0, 5}, Shape{4, 0}, Shape{4, 5}})
      test_aligned(exec, empty.cols == 5 && empty.rows == 4 ? 0 : 3, empty, 5, true, random);
    for (const int64_t cols : kCols)
      for (const int64_t rows : {1, 16, 37})
        for (const int64_t tokens : {1, 5, 6, 13})
          for (const int64_t period : {int64_t{3}, cols, cols + 1, rows * cols})
            test_panels(exec, tokens, {rows, cols}, period, tokens % 2 == 0, random);
    // Panels in several turns, each thread decoding all of them, tokens in several turns; nothing.
    test_panels(exec, 9, {200, 1300}, 4000, true, random);
    test_panels(exec, 400, {40, 5000}, 777, false, random);
    test_panels(exec, 6500, {40, 1057}, 777, true, random);
    for (const Shape empty : {Shape{0, 5}, Shape{4, 0}, Shape{4, 5}})
      test_panels(exec, empty.cols == 5 && empty.rows == 4 ? 0 : 3, empty, 7, true, random);
    // Several column blocks, many rows, few rows with many tokens, a walk with a stride.
    test_linear(exec, 2, {9, 13'001}, 4000, true, random);
    test_linear(exec, 7, {5, 5000}, 25'000, true, random);
    test_linear(exec, 1, {700, 300}, 2999, false, random);
    test_linear(exec, 300, {3, 130}, 77, true, random);
    for (const Shape empty : {Shape{0, 5}, Shape{4, 0}, Shape{4, 5}})
      test_linear(exec, empty.cols == 5 && empty.rows == 4 ? 0 : 3, empty, 7, true, random);
  });
}
