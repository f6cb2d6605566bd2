// Fetching ahead what the hardware would not foresee in time.
#pragma once

#include "target.h"

#include "masked_kernels/bits.h"

namespace masked_kernels {

// Floats that will be needed soon, asked for in shares: too many at once would occupy all buffers
// that the loads of the work in between need.
struct Ahead {
  const float *begin = nullptr, *end = nullptr;

  // Share `part` of `parts`.
  Ahead share(int64_t part, int64_t parts) const {
    const int64_t lines = ceil_div(end - begin, kLine);
    return {begin + lines * part / parts * kLine, begin + lines * (part + 1) / parts * kLine};
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
