// Kept values back to the columns where they belong: what compact_linear and panel_linear share.
#pragma once

#include "target.h"

#include "masked_kernels/bits.h"

#include <algorithm>
#include <cstdint>

namespace masked_kernels {
namespace {

// out [cols] = the values of a row's columns, 0 where the bit is not set. `next` are those that are
// kept, up to `end`; it moves behind them.
using SpreadRow = void (*)(
    const float*& next, const float* end, const uint32_t* words, int64_t cols, float* out);

MK_INLINE void spread_row_body(
    const float*& next, const uint32_t* words, int64_t col, int64_t cols, float* out) {
  for (; col < cols; ++col)
    out[col] = words[col / kWordBits] >> col % kWordBits & 1 ? *next++ : 0.0f;
}

namespace scalar {
inline void spread_row(
    const float*& next, const float*, const uint32_t* words, int64_t cols, float* out) {
  spread_row_body(next, words, 0, cols, out);
}
} // namespace scalar

#if MK_X86
namespace avx2 {

constexpr int64_t kSpread = 8; // values at a time

// By eight bits: where each lane's value stands among those kept. A lane whose bit is not set is
// negative.
struct Places {
  alignas(32) int32_t of[1 << kSpread][kSpread];
};

constexpr Places find_places() {
  Places places = {};
  for (int bits = 0; bits < 1 << kSpread; ++bits)
    for (int lane = 0, next = 0; lane < kSpread; ++lane)
      places.of[bits][lane] = bits >> lane & 1 ? next++ : -1;
  return places;
}

constexpr Places kPlaces = find_places();

// The values of eight columns, 0 where the bit is not set; `next` moves behind them. Reads eight
// values, unless kNearEnd, then none from `end` on.
template <bool kNearEnd>
MK_AVX2 MK_INLINE __m256 spread(const float*& next, const float* end, uint8_t bits) {
  const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces.of[bits]));
  __m256 values;
  if (kNearEnd && end - next < kSpread) {
    float rest[kSpread] = {};
    std::copy(next, end, rest);
    values = _mm256_loadu_ps(rest);
  } else {
    values = _mm256_loadu_ps(next);
  }
  asm("" : "+x"(values)); // a permutation of memory takes Zen 3 twice as long
  next += __builtin_popcount(bits);
  return _mm256_blendv_ps(
      _mm256_permutevar8x32_ps(values, places), _mm256_setzero_ps(), _mm256_castsi256_ps(places));
}

MK_AVX2 inline void spread_row(
    const float*& next, const float* end, const uint32_t* words, int64_t cols, float* out) {
  int64_t col = 0;
  for (; col + kWordBits <= cols && end - next >= kWordBits + kSpread; col += kWordBits) {
    const uint32_t word = words[col / kWordBits];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kWordBits; i += kSpread)
      _mm256_storeu_ps(out + col + i, spread<false>(next, end, static_cast<uint8_t>(word >> i)));
  }
  spread_row_body(next, words, col, cols, out);
}

} // namespace avx2

namespace avx512 {

constexpr int64_t kSpread = 16; // values at a time

// The values of sixteen columns, 0 where the bit is not set; `next` moves behind them. Reads
// sixteen values, unless kNearEnd, then none from `end` on. As the instruction for this is
// microcode on Zen 5, a permutation takes 3 cycles in place of 5.
template <bool kNearEnd>
MK_AVX512 MK_INLINE __m512 spread(const float*& next, const float* end, uint32_t bits) {
  const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const uint64_t lanes = _pdep_u64(bits, 0x1111111111111111) * 0xf; // of the set bits, 4 bits each
  const uint64_t places = _pdep_u64(0xfedcba9876543210, lanes);     // among the values
  const __m512i index = _mm512_srlv_epi32(
      _mm512_permutexvar_epi32(half, _mm512_castsi128_si512(_mm_cvtsi64_si128(places))), shift);
  const __m512 values =
      kNearEnd ? _mm512_maskz_loadu_ps(
                     static_cast<__mmask16>(low_bits(std::min(kSpread, end - next))), next)
               : _mm512_loadu_ps(next);
  next += __builtin_popcount(bits);
  return _mm512_maskz_permutexvar_ps(static_cast<__mmask16>(bits), index, values);
}

MK_AVX512 inline void spread_row(
    const float*& next, const float* end, const uint32_t* words, int64_t cols, float* out) {
  int64_t col = 0;
  const auto bits_of = [&](int64_t col) {
    return words[col / kWordBits] >> col % kWordBits & low_bits(kSpread);
  };
  for (; col + kSpread <= cols && end - next >= kSpread; col += kSpread)
    _mm512_storeu_ps(out + col, spread<false>(next, end, bits_of(col)));
  for (; col < cols; col += kSpread) {
    const __m512 values = spread<true>(next, end, bits_of(col));
    _mm512_mask_storeu_ps(out + col, static_cast<__mmask16>(low_bits(cols - col)), values);
  }
}

} // namespace avx512
#endif

} // namespace
} // namespace masked_kernels
