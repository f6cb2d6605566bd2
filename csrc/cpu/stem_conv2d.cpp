// y = epilogue(convolution of x with w . m) for rows of few columns, as the first layer of a
// network has them. The decoded weight of 16 rows stays in the L1 cache, and a pass over some
// patches has its sums in registers, to which the epilogue goes at once.
#include "epilogue.h"

#include <algorithm>
#include <vector>

namespace masked_kernels {
namespace {

constexpr int64_t kBlockRows = 16;
constexpr int64_t kPassTokens = 64; // whose patches stay in the L1 cache

// Some tokens, whose patches are [tokens, cols].
struct Tokens {
  int64_t first, count;
  const float* patches;
};

// y of 16 rows or what is left of them. filters [cols, 16]
template <int kLanes>
MK_INLINE void multiply_block(
    const StemConv2d& p, const float* filters, const Tokens& tokens, int64_t row) {
  constexpr int64_t kVectors = kBlockRows / kLanes, kTokens = 8 / kVectors; // sums in 8 registers
  const int64_t rows = p.rows, cols = p.cols();
  float* const y = p.y;
  alignas(64) float sums[kPassTokens][kBlockRows];
  for (int64_t t = 0; t < tokens.count; t += kTokens) {
    const float* patch[kTokens]; // the last again for those that are not there
    for (int64_t i = 0; i < kTokens; ++i)
      patch[i] = tokens.patches + std::min(t + i, tokens.count - 1) * cols;
    Floats<kLanes> sum[kTokens][kVectors] = {};
    for (int64_t k = 0; k < cols; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto w = load<kLanes>(filters + k * kBlockRows + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i)
          sum[i][v] += w * patch[i][k];
      }
    for (int64_t i = 0; i < std::min(kTokens, tokens.count - t); ++i)
      for (int v = 0; v < kVectors; ++v)
        store<kLanes>(sums[t + i] + v * kLanes, sum[i][v]);
  }
  for (int64_t lane = 0; lane < std::min(kBlockRows, rows - row); lane += kLanes) {
    const int64_t count = rows - row - lane;
    const Finish<kLanes> finish(p.epilogue, row + lane, count);
    int64_t at = tokens.first * rows + row + lane;
    for (int64_t t = 0; t < tokens.count; ++t, at += rows)
      store<kLanes>(y + at, finish(load<kLanes>(sums[t] + lane), at), count);
  }
}

namespace scalar {
void multiply(const StemConv2d& p, const float* filters, const Tokens& tokens, int64_t row) {
  multiply_block<4>(p, filters, tokens, row);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
MK_AVX2 void multiply(
    const StemConv2d& p, const float* filters, const Tokens& tokens, int64_t row) {
  multiply_block<8>(p, filters, tokens, row);
}
} // namespace avx2

namespace avx512 {
MK_AVX512 void multiply(
    const StemConv2d& p, const float* filters, const Tokens& tokens, int64_t row) {
  multiply_block<16>(p, filters, tokens, row);
}
} // namespace avx512
#endif

// filters [blocks of rows, cols, 16], columns in the order of a patch
std::vector<float> filters_of(const StemConv2d& p, const Exec& exec) {
  const int64_t cols = p.cols();
  std::vector<float> weight(p.rows * cols);
  decode({p.values, p.period, sizeof(float), p.words, cols, 0, p.rows, weight.data(),
             p.patches.kernel_h * p.patches.kernel_w},
      exec);
  std::vector<float> filters(ceil_div(p.rows, kBlockRows) * cols * kBlockRows);
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t k = 0; k < cols; ++k)
      filters[(row / kBlockRows * cols + k) * kBlockRows + row % kBlockRows] =
          weight[row * cols + k];
  return filters;
}

} // namespace

void stem_conv2d(const StemConv2d& p, const Exec& exec) {
  const int64_t cols = p.cols(), tokens = p.tokens();
  if (tokens * p.rows == 0)
    return;
  const auto multiply = MK_BY_ISA(exec.isa, multiply);
  const std::vector<float> filters = filters_of(p, exec);
  constexpr int64_t kGrain = 1 << 17; // products worth waking a thread for
  exec.parallel.run(0, ceil_div(tokens, kPassTokens), ceil_div(kGrain, kPassTokens * cols * p.rows),
      [&](int64_t begin, int64_t end) {
        std::vector<float> patches(kPassTokens * cols);
        for (int64_t first = begin * kPassTokens; first < std::min(end * kPassTokens, tokens);
            first += kPassTokens) {
          const Tokens some{first, std::min(kPassTokens, tokens - first), patches.data()};
          p.patches.copy(p.x, some.first, some.count, patches.data(), cols);
          for (int64_t row = 0; row < p.rows; row += kBlockRows)
            multiply(p, &filters[row * cols], some, row);
        }
      });
}

} // namespace masked_kernels
