// What the select kernels share. Scores are compared as keys: 32-bit unsigned integers in the same
// order, equal where the scores are. |score| is the float's bits without the sign; a signed score
// flips its bits so that negative floats come first and in reverse.
#pragma once

#include "target.h"

#include "masked_kernels/bits.h"
#include "masked_kernels/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace masked_kernels {

constexpr uint32_t kSignBit = 0x80000000u;

template <bool kAbsolute>
MK_INLINE uint32_t key_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  if (kAbsolute)
    return bits << 1;
  bits = bits == kSignBit ? 0 : bits; // -0.0 ties with +0.0
  return bits ^ (bits & kSignBit ? ~0u : kSignBit);
}

// The flat index of the first NaN, or -1.
inline int64_t first_nan(const float* scores, int64_t count, const Parallel& parallel) {
  constexpr int64_t kBlock = 1024;
  std::atomic<int64_t> first{count};
  parallel.run(0, ceil_div(count, kBlock), 64, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const float* s = scores + block * kBlock;
      const int64_t n = std::min(kBlock, count - block * kBlock);
      bool any = false; // without an early exit the loop is a few vector instructions
      for (int64_t i = 0; i < n; ++i)
        any |= s[i] != s[i];
      if (!any)
        continue;
      const int64_t found = std::find_if(s, s + n, [](float x) { return x != x; }) - scores;
      int64_t seen = first;
      while (found < seen && !first.compare_exchange_weak(seen, found)) {
      }
      return;
    }
  });
  return first < count ? first.load() : -1;
}

#if MK_X86
// The keys of floats, given as bits.
template <bool kAbsolute>
MK_AVX2 MK_INLINE __m256i keys_of(__m256i bits) {
  if (kAbsolute)
    return _mm256_slli_epi32(bits, 1);
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(kSignBit));
  bits = _mm256_andnot_si256(_mm256_cmpeq_epi32(bits, sign), bits); // -0.0 ties with +0.0
  return _mm256_xor_si256(bits, _mm256_or_si256(_mm256_srai_epi32(bits, 31), sign));
}
template <bool kAbsolute>
MK_AVX512 MK_INLINE __m512i keys_of(__m512i bits) {
  if (kAbsolute)
    return _mm512_slli_epi32(bits, 1);
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(kSignBit));
  bits = _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(bits, sign), bits); // -0.0 ties with +0.0
  return _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
}
#endif

} // namespace masked_kernels
