// Fetching ahead what the hardware would not foresee in time.
#pragma once

#include "target.h"

#include "masked_kernels/bits.h"

#include <algorithm>

namespace masked_kernels {

// Floats that will be needed soon, asked for in shares: too many at once would occupy all buffers
// that the loads of the work in between need.
struct Ahead {
  const float *begin = nullptr, *end = nullptr;

  int64_t lines() const { return ceil_div(end - begin, kLine); }

  // Share `part` of `parts`.
  Ahead share(int64_t part, int64_t parts) const {
    return {begin + lines() * part / parts * kLine, begin + lines() * (part + 1) / parts * kLine};
  }

  // So many lines, which are then no longer in this.
  MK_INLINE Ahead take(int64_t lines) {
    const float* const from = begin;
    begin = std::min(begin + lines * kLine, end);
    return {from, begin};
  }

  // Into the L2 cache.
  MK_INLINE void fetch() const {
    for (const float* line = begin; line < end; line += kLine)
      __builtin_prefetch(line, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
};

} // namespace masked_kernels
