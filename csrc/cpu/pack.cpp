// Masks between bytes and bits, and counts of bits.
#include "spans.h"
#include "target.h"

#include "masked_kernels/kernels.h"

namespace masked_kernels {
namespace {

MK_INLINE void pack_span_body(const uint8_t* mask, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += kWordBits, mask += kWordBits) {
    const int64_t bits = std::min(kWordBits, count - i);
    uint32_t word = 0;
    for (int64_t j = 0; j < bits; ++j)
      word |= uint32_t{mask[j] != 0} << j;
    *words++ = word;
  }
}

MK_INLINE void unpack_span_body(const uint32_t* words, int64_t count, uint8_t* mask) {
  for (int64_t i = 0; i < count; i += kWordBits, mask += kWordBits) {
    const int64_t bits = std::min(kWordBits, count - i);
    const uint32_t word = *words++;
    for (int64_t j = 0; j < bits; ++j)
      mask[j] = word >> j & 1;
  }
}

MK_INLINE int64_t popcount_span_body(const uint32_t* words, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += __builtin_popcount(words[i]);
  return sum;
}

namespace scalar {
void pack_span(const uint8_t* mask, int64_t count, uint32_t* words) {
  pack_span_body(mask, count, words);
}
void unpack_span(const uint32_t* words, int64_t count, uint8_t* mask) {
  unpack_span_body(words, count, mask);
}
int64_t popcount_span(const uint32_t* words, int64_t count) {
  return popcount_span_body(words, count);
}
} // namespace scalar

#if MK_X86
namespace avx2 {

MK_AVX2 void pack_span(const uint8_t* mask, int64_t count, uint32_t* words) {
  const __m256i zero = _mm256_setzero_si256();
  for (; count >= kWordBits; count -= kWordBits, mask += kWordBits) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
    *words++ = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, zero)));
  }
  pack_span_body(mask, count, words);
}

MK_AVX2 void unpack_span(const uint32_t* words, int64_t count, uint8_t* mask) {
  unpack_span_body(words, count, mask);
}

MK_AVX2 int64_t popcount_span(const uint32_t* words, int64_t count) {
  return popcount_span_body(words, count);
}

} // namespace avx2

namespace avx512 {

MK_AVX512 void pack_span(const uint8_t* mask, int64_t count, uint32_t* words) {
  for (; count > 0; count -= kWordBits, mask += kWordBits) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(low_bits(count), mask);
    *words++ = _mm256_test_epi8_mask(bytes, bytes);
  }
}

MK_AVX512 void unpack_span(const uint32_t* words, int64_t count, uint8_t* mask) {
  for (; count > 0; count -= kWordBits, mask += kWordBits)
    _mm256_mask_storeu_epi8(mask, low_bits(count), _mm256_maskz_set1_epi8(*words++, 1));
}

using avx2::popcount_span;

} // namespace avx512
#endif

} // namespace

void pack(const uint8_t* mask, Shape shape, uint32_t* words, const Exec& exec) {
  const auto pack_span = MK_BY_ISA(exec.isa, pack_span);
  parallel_spans(joined(shape), exec.parallel,
      [&](const Span& s) { pack_span(mask + s.element, s.count, words + s.word); });
}

void unpack(const uint32_t* words, Shape shape, uint8_t* mask, const Exec& exec) {
  const auto unpack_span = MK_BY_ISA(exec.isa, unpack_span);
  parallel_spans(joined(shape), exec.parallel,
      [&](const Span& s) { unpack_span(words + s.word, s.count, mask + s.element); });
}

void popcount(const uint32_t* words, Shape shape, int64_t* counts, const Exec& exec) {
  const auto popcount_span = MK_BY_ISA(exec.isa, popcount_span);
  const int64_t row_words = words_per_row(shape.cols);
  const int64_t grain = ceil_div(kGrainWords, std::max<int64_t>(row_words, 1));
  exec.parallel.run(0, shape.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      counts[row] = popcount_span(words + row * row_words, row_words);
  });
}

} // namespace masked_kernels
