// pack, unpack, popcount, transpose, decode, scored_grad and the choice of an instruction set.
#include "testing.h"

#include <stdexcept>

using namespace testing;

namespace {

void test_masks(const Exec& exec, Shape shape, Random& random) {
  const std::vector<uint32_t> expected = random.words(shape);
  std::vector<uint8_t> mask(shape.elements(), 2);
  unpack(expected.data(), shape, mask.data(), exec);
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t col = 0; col < shape.cols; ++col)
      CHECK(
          mask[row * shape.cols + col] == bit(expected, shape, row, col), name(exec.isa), row, col);

  for (uint8_t& byte : mask)
    byte = byte ? 1 + random.bits() % 255 : 0; // any byte but 0 is true
  std::vector<uint32_t> words(shape.words(), ~0u);
  pack(mask.data(), shape, words.data(), exec);
  CHECK(words == expected, name(exec.isa), shape.rows, shape.cols);

  std::vector<int64_t> counts(shape.rows, -1);
  popcount(words.data(), shape, counts.data(), exec);
  const Shape turned{shape.cols, shape.rows};
  std::vector<uint32_t> transposed(turned.words(), ~0u);
  transpose(words.data(), shape, transposed.data(), exec);
  for (int64_t row = 0; row < shape.rows; ++row) {
    int64_t count = 0;
    for (int64_t col = 0; col < shape.cols; ++col) {
      count += bit(words, shape, row, col);
      CHECK(bit(transposed, turned, col, row) == bit(words, shape, row, col), name(exec.isa),
          shape.rows, shape.cols, row, col);
    }
    CHECK(counts[row] == count, name(exec.isa), row, counts[row], count);
  }
  std::vector<uint32_t> twice(shape.words(), ~0u); // also proves that the padding is 0
  transpose(transposed.data(), turned, twice.data(), exec);
  CHECK(twice == words, name(exec.isa), shape.rows, shape.cols);
}

std::vector<int64_t> periods(Shape shape) {
  return {1, 3, 16, shape.cols / 2 + 1, shape.cols, shape.cols + 1, 3 * shape.cols - 1,
      shape.elements(), shape.elements() + 5};
}

template <class T>
void test_decode(const Exec& exec, Shape shape, int64_t period, Random& random) {
  std::vector<T> values(period);
  for (T& value : values)
    value = static_cast<T>(uint64_t{random.bits()} << 32 | random.bits());
  const std::vector<uint32_t> words = random.words(shape);
  const int64_t begin = shape.rows / 3, end = shape.rows;
  for (const int64_t taps : {1, 3, 8, 9, 20}) {
    if (shape.cols % taps != 0)
      continue;
    std::vector<T> out((end - begin) * shape.cols, 1);
    decode(
        {values.data(), period, sizeof(T), words.data(), shape.cols, begin, end, out.data(), taps},
        exec);
    const int64_t channels = shape.cols / taps;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < shape.cols; ++col) {
        const T expected =
            bit(words, shape, row, col) ? values[(row * shape.cols + col) % period] : 0;
        const int64_t at = col % taps * channels + col / taps;
        CHECK(out[(row - begin) * shape.cols + at] == expected, name(exec.isa), sizeof(T),
            shape.cols, period, taps, row, col);
      }
  }
}

void test_decode_in_place(const Exec& exec, Shape shape, Random& random) {
  std::vector<float> weight = random.floats(shape.elements());
  const std::vector<float> before = weight;
  const std::vector<uint32_t> words = random.words(shape);
  decode(
      {weight.data(), shape.elements(), 4, words.data(), shape.cols, 0, shape.rows, weight.data()},
      exec);
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t col = 0; col < shape.cols; ++col) {
      const int64_t i = row * shape.cols + col;
      CHECK(weight[i] == (bit(words, shape, row, col) ? before[i] : 0), name(exec.isa), row, col);
    }
}

void test_scored_grad(
    const Exec& exec, int64_t count, int64_t period, bool absolute, Random& random) {
  std::vector<float> grad = random.floats(count), values = random.floats(period),
                     scores = random.floats(count);
  if (count > 1)
    scores[count / 2] = 0.0f;
  const std::vector<float> before = grad;
  scored_grad(
      {grad.data(), values.data(), period, absolute ? scores.data() : nullptr, 0.5f, count}, exec);
  for (int64_t i = 0; i < count; ++i) {
    const float sign = !absolute ? 1 : scores[i] > 0 ? 1 : scores[i] < 0 ? -1 : 0;
    const float expected = before[i] * (0.5f * values[i % period] * sign);
    CHECK(std::abs(grad[i] - expected) <= 1e-6f * std::abs(expected), name(exec.isa), count, period,
        i);
  }
}

void test_isa() {
  CHECK(resolve_isa(nullptr) == best_isa(), name(best_isa()));
  CHECK(resolve_isa("") == best_isa(), name(best_isa()));
  CHECK(resolve_isa("scalar") == Isa::scalar, "scalar");
  try {
    resolve_isa("avx9");
    CHECK(false, "an unknown name was taken");
  } catch (const std::invalid_argument& error) {
    CHECK(std::strstr(error.what(), "avx9"), error.what());
  }
}

} // namespace

int main() {
  test_isa();
  for_each_exec([](const Exec& exec) {
    Random random;
    for (const int64_t cols : kCols) {
      for (const int64_t rows : {1, 5, 33, 70}) {
        const Shape shape{rows, cols};
        test_masks(exec, shape, random);
        test_decode_in_place(exec, shape, random);
        for (const int64_t period : periods(shape)) {
          test_decode<uint16_t>(exec, shape, period, random);
          test_decode<uint32_t>(exec, shape, period, random);
          test_decode<uint64_t>(exec, shape, period, random);
        }
      }
    }
    test_masks(exec, {1, 200'001}, random); // one long row, shared among threads
    for (const Shape empty : {Shape{0, 5}, Shape{5, 0}, Shape{0, 0}})
      test_masks(exec, empty, random);
    for (const int64_t count : {1, 31, 1000, 100'003})
      for (const int64_t period : {1, 7, 1023, 1024, 70'000, 200'000})
        for (const bool absolute : {false, true})
          test_scored_grad(exec, count, period, absolute, random);
  });
}
