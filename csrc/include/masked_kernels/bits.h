// Packed masks: row r of a [rows, cols] mask is ceil(cols / 32) words; bit j (least significant
// first) of word w is column 32 * w + j; bits past the last column are 0.
#pragma once

#include <cstdint>

namespace masked_kernels {

constexpr int64_t kWordBits = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t words_per_row(int64_t cols) {
  return ceil_div(cols, kWordBits);
}

// A word with its `count` lowest bits set; any count >= 32 gives a full word.
constexpr uint32_t low_bits(int64_t count) {
  return count >= kWordBits ? ~0u : (1u << count) - 1;
}

struct Shape {
  int64_t rows, cols;

  constexpr int64_t elements() const { return rows * cols; }
  constexpr int64_t words() const { return rows * words_per_row(cols); }
};

} // namespace masked_kernels
