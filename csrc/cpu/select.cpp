// Scores to packed masks: a threshold, n of m.
#include "scores.h"
#include "spans.h"

#include "masked_kernels/kernels.h"

#include <numeric>
#include <vector>

namespace masked_kernels {
namespace {

// Returns whether a score is NaN.
MK_INLINE bool threshold_span_body(
    const float* scores, int64_t count, float threshold, uint32_t* words) {
  bool nan = false;
  for (int64_t i = 0; i < count; i += kWordBits, scores += kWordBits) {
    const int64_t bits = std::min(kWordBits, count - i);
    uint32_t word = 0;
    for (int64_t j = 0; j < bits; ++j) {
      word |= uint32_t{scores[j] > threshold} << j;
      nan |= scores[j] != scores[j];
    }
    *words++ = word;
  }
  return nan;
}

MK_INLINE void set_bit(uint32_t* words, int64_t i) {
  words[i / kWordBits] |= 1u << i % kWordBits;
}

// Keeps the n largest of `count` consecutive scores whose first bit is `base`. Composite keys
// (key, index) never tie: among equal scores the higher index wins.
template <bool kAbsolute>
void keep_largest(const float* scores, int64_t count, int64_t n, int64_t base, uint32_t* words,
    std::vector<uint64_t>& keys) {
  n = std::min(n, count);
  keys.resize(count);
  for (int64_t i = 0; i < count; ++i)
    keys[i] = uint64_t{key_of<kAbsolute>(scores[i])} << 32 | static_cast<uint32_t>(i);
  std::nth_element(keys.begin(), keys.begin() + (count - n), keys.end());
  for (int64_t i = count - n; i < count; ++i)
    set_bit(words, base + static_cast<uint32_t>(keys[i]));
}

// A span starts on a group; only its last group may be shorter than m.
template <bool kAbsolute>
void nm_groups(
    const float* scores, int64_t begin, int64_t count, int64_t n, int64_t m, uint32_t* words) {
  std::vector<uint64_t> keys;
  for (int64_t i = begin; i < count; i += m)
    keep_largest<kAbsolute>(scores + i, std::min(m, count - i), n, i, words, keys);
}

namespace scalar {

bool threshold_span(const float* scores, int64_t count, float threshold, uint32_t* words) {
  return threshold_span_body(scores, count, threshold, words);
}
template <bool kAbsolute>
void nm_span(const float* scores, int64_t count, int64_t n, int64_t m, uint32_t* words) {
  std::fill_n(words, words_per_row(count), 0u);
  nm_groups<kAbsolute>(scores, 0, count, n, m, words);
}

} // namespace scalar

#if MK_X86
namespace avx2 {

constexpr int64_t kLanes = 8;

// One bit a lane, of lanes that are all ones or all zeros.
MK_AVX2 MK_INLINE uint32_t bits_of(__m256 lanes) {
  return static_cast<uint32_t>(_mm256_movemask_ps(lanes));
}
MK_AVX2 MK_INLINE uint32_t bits_of(__m256i lanes) {
  return bits_of(_mm256_castsi256_ps(lanes));
}

MK_AVX2 bool threshold_span(const float* scores, int64_t count, float threshold, uint32_t* words) {
  const __m256 cut = _mm256_set1_ps(threshold);
  __m256 nan = _mm256_setzero_ps();
  for (; count >= kWordBits; count -= kWordBits, scores += kWordBits) {
    uint32_t word = 0;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kWordBits; i += kLanes) {
      const __m256 s = _mm256_loadu_ps(scores + i);
      word |= bits_of(_mm256_cmp_ps(s, cut, _CMP_GT_OQ)) << i;
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(s, s, _CMP_UNORD_Q));
    }
    *words++ = word;
  }
  const bool in_rest = threshold_span_body(scores, count, threshold, words);
  return in_rest || bits_of(nan) != 0;
}

// Groups that tile a vector: each lane counts the lanes of its group that beat it, by rotating the
// keys within the groups.
template <bool kAbsolute>
MK_AVX2 void nm_span(const float* scores, int64_t count, int64_t n, int64_t m, uint32_t* words) {
  std::fill_n(words, words_per_row(count), 0u);
  int64_t i = 0;
  if (m <= kLanes && kLanes % m == 0) {
    const __m256i sign = _mm256_set1_epi32(static_cast<int>(kSignBit)); // comparisons are signed
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i in_group = _mm256_set1_epi32(static_cast<int>(m - 1));
    const __m256i limit = _mm256_set1_epi32(static_cast<int>(std::min(n, m)));
    for (; i + kLanes <= count; i += kLanes) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + i));
      const __m256i keys = _mm256_xor_si256(keys_of<kAbsolute>(bits), sign);
      __m256i beaten = _mm256_setzero_si256();
      for (int step = 1; step < m; ++step) {
        const __m256i turned = _mm256_add_epi32(lane, _mm256_set1_epi32(step));
        const __m256i from = _mm256_or_si256(
            _mm256_and_si256(turned, in_group), _mm256_andnot_si256(in_group, lane));
        const __m256i other = _mm256_permutevar8x32_epi32(keys, from);
        const __m256i ties =
            _mm256_and_si256(_mm256_cmpgt_epi32(from, lane), _mm256_cmpeq_epi32(other, keys));
        const __m256i beats = _mm256_or_si256(_mm256_cmpgt_epi32(other, keys), ties);
        beaten = _mm256_sub_epi32(beaten, beats);
      }
      words[i / kWordBits] |= bits_of(_mm256_cmpgt_epi32(limit, beaten)) << i % kWordBits;
    }
  }
  nm_groups<kAbsolute>(scores, i, count, n, m, words);
}

} // namespace avx2

namespace avx512 {

constexpr int64_t kLanes = 16;

MK_AVX512 bool threshold_span(
    const float* scores, int64_t count, float threshold, uint32_t* words) {
  const __m512 cut = _mm512_set1_ps(threshold);
  uint32_t nan = 0;
  for (; count > 0; count -= kWordBits, scores += kWordBits) {
    const uint32_t lanes = low_bits(count);
    const auto low = static_cast<__mmask16>(lanes), high = static_cast<__mmask16>(lanes >> kLanes);
    const __m512 a = _mm512_maskz_loadu_ps(low, scores);
    const __m512 b = _mm512_maskz_loadu_ps(high, scores + kLanes);
    *words++ = _mm512_mask_cmp_ps_mask(low, a, cut, _CMP_GT_OQ) |
               uint32_t{_mm512_mask_cmp_ps_mask(high, b, cut, _CMP_GT_OQ)} << kLanes;
    nan |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
  }
  return nan != 0;
}

// Groups that tile a vector: each lane counts the lanes of its group that beat it, by rotating the
// keys within the groups.
template <bool kAbsolute>
MK_AVX512 void nm_span(const float* scores, int64_t count, int64_t n, int64_t m, uint32_t* words) {
  std::fill_n(words, words_per_row(count), 0u);
  int64_t i = 0;
  if (m <= kLanes && kLanes % m == 0) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i in_group = _mm512_set1_epi32(static_cast<int>(m - 1));
    const __m512i limit = _mm512_set1_epi32(static_cast<int>(std::min(n, m)));
    const __m512i one = _mm512_set1_epi32(1);
    for (; i + kLanes <= count; i += kLanes) {
      const __m512i keys = keys_of<kAbsolute>(_mm512_loadu_si512(scores + i));
      __m512i beaten = _mm512_setzero_si512();
      for (int step = 1; step < m; ++step) {
        const __m512i turned = _mm512_add_epi32(lane, _mm512_set1_epi32(step));
        const __m512i from = _mm512_or_si512(
            _mm512_and_si512(turned, in_group), _mm512_andnot_si512(in_group, lane));
        const __m512i other = _mm512_permutexvar_epi32(from, keys);
        const __mmask16 later = _mm512_cmpgt_epi32_mask(from, lane);
        const __mmask16 beats =
            _mm512_cmpgt_epu32_mask(other, keys) | _mm512_mask_cmpeq_epi32_mask(later, other, keys);
        beaten = _mm512_mask_add_epi32(beaten, beats, beaten, one);
      }
      words[i / kWordBits] |= uint32_t{_mm512_cmplt_epi32_mask(beaten, limit)} << i % kWordBits;
    }
  }
  nm_groups<kAbsolute>(scores, i, count, n, m, words);
}

} // namespace avx512
#endif

template <bool kAbsolute>
int64_t select_nm_as(const SelectNM& p, const Exec& exec) {
  // Threads share units of columns that hold whole words and whole groups.
  const int64_t unit = std::lcm(kWordBits, p.m);
  const int64_t row_units = ceil_div(p.shape.cols, unit), row_words = words_per_row(p.shape.cols);
  const auto nm_span = MK_BY_ISA(exec.isa, nm_span<kAbsolute>);
  const int64_t grain = ceil_div(kGrainWords * kWordBits, unit);
  exec.parallel.run(0, p.shape.rows * row_units, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / row_units, next = std::min(end, (row + 1) * row_units);
      const int64_t col = (begin - row * row_units) * unit;
      const int64_t count = std::min((next - begin) * unit, p.shape.cols - col);
      nm_span(p.scores + row * p.shape.cols + col, count, p.n, p.m,
          p.words + row * row_words + col / kWordBits);
      begin = next;
    }
  });
  return first_nan(p.scores, p.shape.elements(), exec.parallel);
}

} // namespace

int64_t select_nm(const SelectNM& params, const Exec& exec) {
  return params.absolute ? select_nm_as<true>(params, exec) : select_nm_as<false>(params, exec);
}

int64_t select_threshold(
    const float* scores, Shape shape, float threshold, uint32_t* words, const Exec& exec) {
  const auto threshold_span = MK_BY_ISA(exec.isa, threshold_span);
  std::atomic<bool> nan{false};
  parallel_spans(joined(shape), exec.parallel, [&](const Span& s) {
    if (threshold_span(scores + s.element, s.count, threshold, words + s.word))
      nan = true;
  });
  return nan ? first_nan(scores, shape.elements(), exec.parallel) : -1;
}

} // namespace masked_kernels
