// Transpose of a packed mask, by blocks of 32 x 32 bits.
#include "spans.h"
#include "target.h"

#include "masked_kernels/kernels.h"

namespace masked_kernels {
namespace {

// Swaps the off-diagonal halves of ever smaller squares: 16 x 16, 8 x 8, ... 1 x 1.
template <int kHalf>
MK_INLINE void swap_halves(uint32_t (&block)[kWordBits]) {
  constexpr uint32_t low = ~0u / ((1u << kHalf) + 1); // the lower kHalf of every 2 * kHalf bits
  for (int top = 0; top < kWordBits; top += 2 * kHalf) {
    for (int i = top; i < top + kHalf; ++i) {
      const uint32_t differ = (block[i] >> kHalf ^ block[i + kHalf]) & low;
      block[i] ^= differ << kHalf;
      block[i + kHalf] ^= differ;
    }
  }
}

// The blocks [begin, end) of a grid of ceil(cols / 32) x ceil(rows / 32) blocks.
MK_INLINE void transpose_blocks_body(
    const uint32_t* words, Shape shape, uint32_t* transposed, int64_t begin, int64_t end) {
  const int64_t row_words = words_per_row(shape.cols), col_words = words_per_row(shape.rows);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t col = i / col_words, row = i % col_words;
    const int64_t rows = std::min(kWordBits, shape.rows - row * kWordBits);
    const int64_t cols = std::min(kWordBits, shape.cols - col * kWordBits);
    uint32_t block[kWordBits] = {};
    for (int64_t r = 0; r < rows; ++r)
      block[r] = words[(row * kWordBits + r) * row_words + col];
    swap_halves<16>(block);
    swap_halves<8>(block);
    swap_halves<4>(block);
    swap_halves<2>(block);
    swap_halves<1>(block);
    for (int64_t c = 0; c < cols; ++c)
      transposed[(col * kWordBits + c) * col_words + row] = block[c];
  }
}

namespace scalar {
void transpose_blocks(
    const uint32_t* words, Shape shape, uint32_t* transposed, int64_t begin, int64_t end) {
  transpose_blocks_body(words, shape, transposed, begin, end);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
MK_AVX2 void transpose_blocks(
    const uint32_t* words, Shape shape, uint32_t* transposed, int64_t begin, int64_t end) {
  transpose_blocks_body(words, shape, transposed, begin, end);
}
} // namespace avx2

namespace avx512 {
MK_AVX512 void transpose_blocks(
    const uint32_t* words, Shape shape, uint32_t* transposed, int64_t begin, int64_t end) {
  transpose_blocks_body(words, shape, transposed, begin, end);
}
} // namespace avx512
#endif

} // namespace

void transpose(const uint32_t* words, Shape shape, uint32_t* transposed, const Exec& exec) {
  const auto transpose_blocks = MK_BY_ISA(exec.isa, transpose_blocks);
  const int64_t blocks = words_per_row(shape.rows) * words_per_row(shape.cols);
  exec.parallel.run(0, blocks, kGrainWords / kWordBits,
      [&](int64_t begin, int64_t end) { transpose_blocks(words, shape, transposed, begin, end); });
}

} // namespace masked_kernels
