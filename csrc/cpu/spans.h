// Cuts a [rows, cols] mask into spans, so that kernels see contiguous elements and whole words, and
// a single long row is shared among threads as well as many short ones.
#pragma once

#include "masked_kernels/bits.h"
#include "masked_kernels/parallel.h"

#include <algorithm>

namespace masked_kernels {

// Consecutive columns of one row, from a word boundary on.
struct Span {
  int64_t row, col, count;
  int64_t element; // flat index of the first column
  int64_t word;    // flat index of its word
};

// Rows that end on a word boundary read as one long row.
constexpr Shape joined(Shape shape) {
  return shape.cols % kWordBits == 0 ? Shape{1, shape.elements()} : shape;
}

// Calls fn(span) for the spans that hold words [begin, end).
template <class Fn>
void for_each_span(Shape shape, int64_t begin, int64_t end, const Fn& fn) {
  const int64_t row_words = words_per_row(shape.cols);
  for (int64_t word = begin; word < end;) {
    const int64_t row = word / row_words;
    const int64_t next = std::min(end, (row + 1) * row_words);
    const int64_t col = (word - row * row_words) * kWordBits;
    const int64_t count = std::min((next - word) * kWordBits, shape.cols - col);
    fn(Span{row, col, count, row * shape.cols + col, word});
    word = next;
  }
}

// Enough words for a thread to be worth waking.
constexpr int64_t kGrainWords = 2048;

template <class Fn>
void parallel_spans(Shape shape, const Parallel& parallel, const Fn& fn) {
  parallel.run(0, shape.words(), kGrainWords,
      [&](int64_t begin, int64_t end) { for_each_span(shape, begin, end, fn); });
}

} // namespace masked_kernels
