// Memory of a kernel's own.
#pragma once

#include "masked_kernels/bits.h"

#include <algorithm>
#include <memory>

namespace masked_kernels {

// Floats from a cache line on: no vector of them lies in two lines, which would take two loads. Not
// initialised but by zeros().
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : lines_(new Line[ceil_div(count, kLineFloats)]) {}

  static Buffer zeros(int64_t count) {
    Buffer buffer(count);
    std::fill_n(buffer.data(), count, 0.0f);
    return buffer;
  }

  float* data() const { return lines_ ? lines_[0].floats : nullptr; }
  float& operator[](int64_t i) const { return data()[i]; }

 private:
  static constexpr int64_t kLineFloats = 64 / sizeof(float);
  struct alignas(64) Line {
    float floats[kLineFloats];
  };

  std::unique_ptr<Line[]> lines_;
};

} // namespace masked_kernels
