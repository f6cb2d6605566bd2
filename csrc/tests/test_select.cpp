// The select kernels against sorting and counting.
#include "testing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

using namespace testing;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

using Mask = std::vector<bool>;

// Indices [begin, end) from the smallest score on; equals keep their order.
std::vector<int64_t> ranking(
    const std::vector<float>& scores, int64_t begin, int64_t end, bool absolute) {
  std::vector<int64_t> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return absolute ? std::abs(scores[a]) < std::abs(scores[b]) : scores[a] < scores[b];
  });
  return order;
}

void check_words(
    const std::vector<uint32_t>& words, Shape shape, const Mask& kept, const char* what) {
  std::vector<uint32_t> expected(shape.words());
  for (int64_t i = 0; i < shape.elements(); ++i)
    if (kept[i])
      expected[i / shape.cols * words_per_row(shape.cols) + i % shape.cols / 32] |=
          1u << i % shape.cols % 32;
  CHECK(words == expected, what, shape.rows, shape.cols);
}

void test_topk(
    const Exec& exec, const std::vector<float>& scores, Shape shape, int64_t drop, bool absolute) {
  Mask kept(shape.elements(), true);
  const std::vector<int64_t> order = ranking(scores, 0, shape.elements(), absolute);
  for (int64_t i = 0; i < drop; ++i)
    kept[order[i]] = false;
  std::vector<uint32_t> words(shape.words(), ~0u);
  CHECK(select_topk({scores.data(), shape, drop, absolute, words.data()}, exec) == -1,
      name(exec.isa));
  check_words(words, shape, kept, name(exec.isa));
}

void test_threshold(
    const Exec& exec, const std::vector<float>& scores, Shape shape, float threshold) {
  Mask kept(shape.elements());
  for (int64_t i = 0; i < shape.elements(); ++i)
    kept[i] = scores[i] > threshold;
  std::vector<uint32_t> words(shape.words(), ~0u);
  CHECK(
      select_threshold(scores.data(), shape, threshold, words.data(), exec) == -1, name(exec.isa));
  check_words(words, shape, kept, name(exec.isa));
}

void test_nm(const Exec& exec, const std::vector<float>& scores, Shape shape, int64_t n, int64_t m,
    bool absolute) {
  Mask kept(shape.elements());
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t col = 0; col < shape.cols; col += m) {
      const int64_t begin = row * shape.cols + col, count = std::min(m, shape.cols - col);
      const std::vector<int64_t> order = ranking(scores, begin, begin + count, absolute);
      for (int64_t i = std::max<int64_t>(0, count - n); i < count; ++i)
        kept[order[i]] = true;
    }
  std::vector<uint32_t> words(shape.words(), ~0u);
  CHECK(
      select_nm({scores.data(), shape, n, m, absolute, words.data()}, exec) == -1, name(exec.isa));
  check_words(words, shape, kept, name(exec.isa));
}

// The lowest NaN is reported, whatever its sign and payload, and infinities are no NaN.
void test_nan(const Exec& exec, std::vector<float> scores, Shape shape) {
  const int64_t first = shape.elements() / 2;
  scores[0] = -kInf;
  scores[first] = -kNaN;
  scores.back() = kNaN;
  std::vector<uint32_t> words(shape.words());
  for (const bool absolute : {false, true}) {
    for (const int64_t drop : {int64_t{0}, first, shape.elements()})
      CHECK(select_topk({scores.data(), shape, drop, absolute, words.data()}, exec) == first,
          name(exec.isa), drop);
    CHECK(select_nm({scores.data(), shape, 2, 4, absolute, words.data()}, exec) == first,
        name(exec.isa));
  }
  CHECK(select_threshold(scores.data(), shape, 0.0f, words.data(), exec) == first, name(exec.isa));
}

// Distinct, few distinct, all equal, and every special value with both signs.
std::vector<std::vector<float>> score_kinds(int64_t count, Random& random) {
  const float specials[] = {0.0f, -0.0f, kTiny, -kTiny, 1e-40f, kInf, -kInf, 1.0f, -1.0f, 3e38f};
  std::vector<float> ties(count), special(count);
  for (int64_t i = 0; i < count; ++i) {
    ties[i] = static_cast<float>(random.bits() % 5) - 2.0f;
    special[i] = specials[random.bits() % std::size(specials)];
  }
  return {random.floats(count), ties, std::vector<float>(count, -0.0f), special};
}

void test_all(const Exec& exec, Shape shape, Random& random) {
  const int64_t n = shape.elements();
  for (const std::vector<float>& scores : score_kinds(n, random)) {
    for (const bool absolute : {false, true}) {
      for (const int64_t drop : {int64_t{0}, int64_t{1}, n / 3, n / 2, n - 1, n})
        if (0 <= drop && drop <= n)
          test_topk(exec, scores, shape, drop, absolute);
      for (const int64_t m : {1, 2, 4, 5, 8, 16, 32, 50})
        for (const int64_t keep : {int64_t{0}, int64_t{1}, m / 2, m})
          test_nm(exec, scores, shape, keep, m, absolute);
    }
    for (const float threshold : {0.0f, -0.0f, 0.5f, -1.0f, kInf, -kInf})
      test_threshold(exec, scores, shape, threshold);
  }
  if (n > 2)
    test_nan(exec, random.floats(n), shape);
}

} // namespace

int main() {
  for_each_exec([](const Exec& exec) {
    Random random;
    for (const int64_t cols : kCols)
      for (const int64_t rows : {1, 7})
        test_all(exec, {rows, cols}, random);
    for (const Shape empty : {Shape{0, 5}, Shape{5, 0}})
      test_all(exec, empty, random);
    // Large enough for several tasks, joined rows and padded ones.
    for (const Shape shape : {Shape{1, 300'001}, Shape{40'000, 9}, Shape{300, 1024}}) {
      const std::vector<float> scores = random.floats(shape.elements());
      const std::vector<float> equal(shape.elements(), 0.0f);
      for (const bool absolute : {false, true}) {
        test_topk(exec, scores, shape, shape.elements() / 2, absolute);
        test_topk(exec, equal, shape, shape.elements() / 2, absolute);
        test_nm(exec, scores, shape, 2, 4, absolute);
      }
      test_nan(exec, scores, shape);
    }
  });
}
