#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace masked_kernels {

// The values of one weight row as contiguous memory, so that no kernel takes a modulo per element.
// A row starts at `start` = row * cols % period. Most rows lie inside `values`; a copy serves the
// others: of the seam where the prototype starts again, or, when a row holds the prototype more
// than once, of the whole prototype repeated for period + cols elements.
template <class T>
class RowWindows {
 public:
  RowWindows(const T* values, int64_t period, int64_t rows, int64_t cols)
      : values_(values), last_direct_(period - cols) {
    if (rows * cols <= period || period % cols == 0)
      return;
    copied_from_ = std::max<int64_t>(0, period - cols);
    copy_.resize(period - copied_from_ + cols);
    for (int64_t i = copied_from_, done = 0; done < static_cast<int64_t>(copy_.size()); i = 0) {
      const int64_t n = std::min<int64_t>(period - i, copy_.size() - done);
      std::copy_n(values + i, n, copy_.begin() + done);
      done += n;
    }
  }

  const T* at(int64_t start) const {
    return start <= last_direct_ ? values_ + start : copy_.data() + (start - copied_from_);
  }

 private:
  const T* values_;
  int64_t last_direct_; // rows that start later run past the end of values
  int64_t copied_from_ = 0;
  std::vector<T> copy_;
};

} // namespace masked_kernels
