// The select kernels against sorting and counting.
#include "testing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

using namespace testing;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

using Mask = std::vector<bool>;

// Clears the `drop` smallest of scores [begin, end), of equal ones those that come first.
void drop_smallest(const std::vector<float>& scores, int64_t begin, int64_t end, int64_t drop,
    bool absolute, Mask& kept) {
  std::vector<std::pair<float, int64_t>> order;
  for (int64_t i = begin; i < end; ++i)
    order.emplace_back(absolute ? std::abs(scores[i]) : scores[i], i);
  std::nth_element(order.begin(), order.begin() + drop, order.end());
  for (int64_t i = 0; i < drop; ++i)
    kept[order[i].second] = false;
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

void test_topk(const Exec& exec, const std::vector<float>& scores, Shape shape, int64_t drop,
    bool absolute, LastCut* last = nullptr) {
  Mask kept(shape.elements(), true);
  drop_smallest(scores, 0, shape.elements(), drop, absolute, kept);
  std::vector<uint32_t> words(shape.words(), ~0u);
  CHECK(select_topk({scores.data(), shape, drop, absolute, words.data(), last}, exec) == -1,
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
  Mask kept(shape.elements(), true);
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t col = 0; col < shape.cols; col += m) {
      const int64_t begin = row * shape.cols + col, count = std::min(m, shape.cols - col);
      drop_smallest(scores, begin, begin + count, std::max<int64_t>(0, count - n), absolute, kept);
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

// Every line that select_topk's sample sees is far larger than the rest: its guess must miss.
std::vector<float> misleading(int64_t count, Random& random) {
  constexpr int64_t kLine = 16;
  std::vector<float> scores = random.floats(count);
  for (uint32_t i = 0; i < count / 32 / kLine; ++i) {
    const auto line = static_cast<int64_t>(uint64_t{i * 0x9e3779b9u} * (count / kLine) >> 32);
    std::fill_n(&scores[line * kLine], kLine, 1e9f);
  }
  return scores;
}

// Too many equal scores around the median to put them all aside, or so many of them that they just
// fit; and rows of very different size.
std::vector<float> crowded(int64_t count, uint32_t one_in, Random& random) {
  std::vector<float> scores = random.floats(count);
  for (float& score : scores)
    if (random.bits() % one_in == 0)
      score = random.bits() % 2 ? 0.6745f : -0.6745f;
  return scores;
}
std::vector<float> growing(int64_t count, Random& random) {
  std::vector<float> scores = random.floats(count);
  for (int64_t i = 0; i < count; ++i)
    scores[i] *= static_cast<float>(i);
  return scores;
}

// Masks do not depend on where the search starts: scores that stay, move a little, move all over
// and tie, and cuts that no scores had.
void test_last_cut(const Exec& exec, Shape shape, Random& random) {
  const int64_t n = shape.elements();
  for (const bool absolute : {false, true})
    for (const int64_t drop : {int64_t{0}, n / 2, n - 1}) {
      LastCut last;
      std::vector<float> scores = random.floats(n);
      test_topk(exec, scores, shape, drop, absolute, &last);
      const LastCut first = last;
      CHECK(first.reach >= 0, n);
      test_topk(exec, scores, shape, drop, absolute, &last);
      CHECK(last.key == first.key && last.reach <= first.reach, n, last.reach); // it was found
      for (const float step : {1e-4f, 1e-2f, 0.0f, 1.0f, 1e-3f}) {
        for (float& score : scores)
          score += step * random.normal();
        test_topk(exec, scores, shape, drop, absolute, &last);
      }
      for (const std::vector<float>& kind : score_kinds(n, random)) // ties among them
        for (int i = 0; i < 3; ++i)
          test_topk(exec, kind, shape, drop, absolute, &last);
      for (const uint32_t key : {0u, 1u << 31, ~0u})
        for (const int reach : {0, 18, 31}) {
          last = {key, reach};
          test_topk(exec, scores, shape, drop, absolute, &last);
        }
      const LastCut kept = last;
      scores.back() = kNaN;
      std::vector<uint32_t> words(shape.words());
      CHECK(select_topk({scores.data(), shape, drop, absolute, words.data(), &last}, exec) == n - 1,
          name(exec.isa));
      CHECK(last.key == kept.key, n);
    }
}

void test_topk_many(const Exec& exec, Random& random) {
  const Shape shapes[] = {{3, 33}, {1, 1'100'000}, {0, 4}, {1, 1}, {64, 64}, {700, 300}, {5, 0}};
  std::vector<std::vector<float>> scores;
  std::vector<std::vector<uint32_t>> words, expected;
  std::vector<SelectTopk> all;
  for (const Shape shape : shapes) {
    scores.push_back(random.floats(shape.elements()));
    words.emplace_back(shape.words(), ~0u);
    expected.emplace_back(shape.words(), ~0u);
    const int64_t drop = shape.elements() / 3;
    select_topk({scores.back().data(), shape, drop, true, expected.back().data()}, exec);
    all.push_back({scores.back().data(), shape, drop, true, words.back().data()});
  }
  std::vector<int64_t> nans(all.size());
  select_topk_many(all.data(), all.size(), nans.data(), exec);
  CHECK(words == expected, name(exec.isa), exec.parallel.threads());
  CHECK(nans == std::vector<int64_t>(all.size(), -1), name(exec.isa));
  scores[0][7] = scores[1][99] = kNaN;
  select_topk_many(all.data(), all.size(), nans.data(), exec);
  CHECK((nans == std::vector<int64_t>{7, 99, -1, -1, -1, -1, -1}), name(exec.isa));
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
      const int64_t count = shape.elements();
      const std::vector<float> scores = random.floats(count);
      for (const bool absolute : {false, true}) {
        for (const int64_t drop : {int64_t{0}, int64_t{1}, count / 10, count / 2, count - 1, count})
          test_topk(exec, scores, shape, drop, absolute);
        for (const std::vector<float>& kind :
            {std::vector<float>(count, -0.0f), misleading(count, random), growing(count, random),
                crowded(count, 2, random), crowded(count, 8, random), crowded(count, 100, random)})
          for (const int64_t drop : {count / 2, 3 * count / 4})
            test_topk(exec, kind, shape, drop, absolute);
        test_nm(exec, scores, shape, 2, 4, absolute);
      }
      test_nan(exec, scores, shape);
    }
    for (const Shape shape : {Shape{1, 1}, Shape{7, 33}, Shape{100, 64}, Shape{300, 1024}})
      test_last_cut(exec, shape, random);
    test_topk_many(exec, random);
  });
}
