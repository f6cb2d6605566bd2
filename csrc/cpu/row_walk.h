#pragma once

#include <algorithm>
#include <cstdint>

namespace masked_kernels {

// The order in which to visit weight rows so that their values come from the cache.
//
// Row o reads the prototype from o * cols % period on. Rows `stride` apart start `shift` elements
// apart; where that is short, a walk o, o + stride, o + 2 * stride, ... reads nearly the same
// values at each step. One walk for each o < stride visits every row.
class RowWalk {
 public:
  RowWalk(int64_t row_begin, int64_t row_end, int64_t cols, int64_t period)
      : begin_(row_begin), end_(row_end), cols_(cols), period_(period),
        stride_(best_stride(row_end - row_begin, cols, period)), shift_(stride_ * cols % period),
        first_(row_begin), row_(row_begin), start_(row_begin * cols % period) {}

  int64_t row() const { return row_; }
  int64_t start() const { return start_; } // where the row begins in the prototype
  bool done() const { return row_ >= end_; }

  void advance() {
    row_ += stride_;
    start_ += shift_;
    start_ -= start_ >= period_ ? period_ : 0;
    if (row_ >= end_ && first_ + 1 < std::min(begin_ + stride_, end_)) {
      row_ = ++first_;
      start_ = row_ * cols_ % period_;
    }
  }

  // Minimises the values a row reads for the first time: `shift` at every step, `cols` where a walk
  // begins.
  static int64_t best_stride(int64_t rows, int64_t cols, int64_t period) {
    constexpr int64_t kResident = 2048; // so short a prototype stays in the cache in any order
    if (period <= kResident || rows * cols <= period)
      return 1;
    const int64_t step = cols % period;
    int64_t best = 1, least = rows * cols, start = 0;
    for (int64_t stride = 1; stride * cols < least; ++stride) {
      start += step;
      start -= start >= period ? period : 0;
      const int64_t shift = std::min({start, period - start, cols});
      const int64_t reads = shift * rows + stride * cols;
      if (reads < least) {
        least = reads;
        best = stride;
      }
    }
    return best;
  }

 private:
  int64_t begin_, end_, cols_, period_, stride_, shift_;
  int64_t first_; // where the present walk began
  int64_t row_, start_;
};

} // namespace masked_kernels
