// Bits and values to a dense scratch of weight rows.
#include "row_windows.h"
#include "spans.h"
#include "square.h"
#include "target.h"

#include "masked_kernels/kernels.h"

#include <memory>

namespace masked_kernels {
namespace {

template <class T>
MK_INLINE void decode_span_body(const T* values, const uint32_t* words, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += kWordBits, values += kWordBits, out += kWordBits) {
    const int64_t bits = std::min(kWordBits, count - i);
    const uint32_t word = *words++;
    for (int64_t j = 0; j < bits; ++j)
      out[j] = values[j] & -static_cast<T>(word >> j & 1);
  }
}

// out [taps, channels] = the transpose of filter [channels, taps], from channel `channel` on
template <class T>
MK_INLINE void transpose_filter_body(
    const T* filter, int64_t channel, int64_t channels, int64_t taps, T* out) {
  for (; channel < channels; ++channel)
    for (int64_t tap = 0; tap < taps; ++tap)
      out[tap * channels + channel] = filter[channel * taps + tap];
}

namespace scalar {
template <class T>
void transpose_filter(const T* filter, int64_t channels, int64_t taps, T* out) {
  transpose_filter_body(filter, 0, channels, taps, out);
}
template <class T>
void decode_span(const T* values, const uint32_t* words, int64_t count, T* out) {
  decode_span_body(values, words, count, out);
}
} // namespace scalar

#if MK_X86
namespace avx2 {

// The bit of each lane in the word, or, where lanes have 16 bits, in its half of the word.
template <class T>
struct LaneBits {
  static constexpr int kParts = sizeof(T), kLanes = kWordBits / kParts;
  alignas(32) T of[kParts][kLanes] = {};

  constexpr LaneBits() {
    for (int i = 0; i < kWordBits; ++i)
      of[i / kLanes][i % kLanes] = static_cast<T>(uint64_t{1} << i % (8 * sizeof(T)));
  }
};

// All ones in the lanes whose bit is set in both.
template <class T>
MK_AVX2 MK_INLINE __m256i lanes_of(__m256i word, __m256i bits) {
  const __m256i set = _mm256_and_si256(word, bits);
  return sizeof(T) == 2   ? _mm256_cmpeq_epi16(set, bits)
         : sizeof(T) == 4 ? _mm256_cmpeq_epi32(set, bits)
                          : _mm256_cmpeq_epi64(set, bits);
}

template <class T>
MK_AVX2 void decode_span(const T* values, const uint32_t* words, int64_t count, T* out) {
  constexpr int kParts = sizeof(T), kLanes = kWordBits / kParts;
  static constexpr LaneBits<T> kBits;
  __m256i bits[kParts];
  for (int part = 0; part < kParts; ++part)
    bits[part] = _mm256_load_si256(reinterpret_cast<const __m256i*>(kBits.of[part]));
  for (; count >= kWordBits; count -= kWordBits, values += kWordBits, out += kWordBits) {
    const uint32_t word = *words++;
    // Lanes of 16 bits see a half of the word each.
    const __m256i low = sizeof(T) == 8   ? _mm256_set1_epi64x(word)
                        : sizeof(T) == 4 ? _mm256_set1_epi32(static_cast<int>(word))
                                         : _mm256_set1_epi16(static_cast<int16_t>(word));
    const __m256i high = sizeof(T) == 2 ? _mm256_set1_epi16(static_cast<int16_t>(word >> 16)) : low;
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) {
      const auto* from = reinterpret_cast<const __m256i*>(values + part * kLanes);
      const __m256i kept = lanes_of<T>(2 * part < kParts ? low : high, bits[part]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part * kLanes),
          _mm256_and_si256(kept, _mm256_loadu_si256(from)));
    }
  }
  decode_span_body(values, words, count, out);
}
template <class T>
MK_AVX2 void transpose_filter(const T* filter, int64_t channels, int64_t taps, T* out) {
  int64_t channel = 0;
  if constexpr (sizeof(T) == 4) {
    constexpr int64_t kLanes = 8;
    for (; channel + kLanes <= channels; channel += kLanes) {
      const T* from = filter + channel * taps;
      int64_t tap = 0;
      for (; tap + kLanes <= taps; tap += kLanes)
        transpose_square(reinterpret_cast<const float*>(from + tap), taps,
            reinterpret_cast<float*>(out + tap * channels + channel), channels);
      for (; tap < taps; ++tap)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          out[tap * channels + channel + lane] = from[lane * taps + tap];
    }
  }
  transpose_filter_body(filter, channel, channels, taps, out);
}
} // namespace avx2

namespace avx512 {

using avx2::transpose_filter;

MK_AVX512 MK_INLINE void move(__mmask32 lanes, __mmask32 set, const uint16_t* from, uint16_t* to) {
  _mm512_mask_storeu_epi16(to, lanes, _mm512_maskz_loadu_epi16(set, from));
}
MK_AVX512 MK_INLINE void move(__mmask16 lanes, __mmask16 set, const uint32_t* from, uint32_t* to) {
  _mm512_mask_storeu_epi32(to, lanes, _mm512_maskz_loadu_epi32(set, from));
}
MK_AVX512 MK_INLINE void move(__mmask8 lanes, __mmask8 set, const uint64_t* from, uint64_t* to) {
  _mm512_mask_storeu_epi64(to, lanes, _mm512_maskz_loadu_epi64(set, from));
}

template <class T>
MK_AVX512 void decode_span(const T* values, const uint32_t* words, int64_t count, T* out) {
  using Lanes = std::conditional_t<sizeof(T) == 2, __mmask32,
      std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>>;
  constexpr int64_t kLanes = 64 / sizeof(T);
  for (; count > 0; count -= kWordBits, values += kWordBits, out += kWordBits) {
    const uint32_t word = *words++, lanes = low_bits(count);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kWordBits; j += kLanes)
      move(static_cast<Lanes>(lanes >> j), static_cast<Lanes>(word >> j & lanes >> j), values + j,
          out + j);
  }
}

} // namespace avx512
#endif

template <class T>
void decode_as(const Decode& p, const Exec& exec) {
  if (p.cols == 0)
    return;
  const RowWindows<T> windows(static_cast<const T*>(p.values), p.period, p.row_end, p.cols);
  const uint32_t* words = p.words + p.row_begin * words_per_row(p.cols);
  T* out = static_cast<T*>(p.out);
  const auto decode_span = MK_BY_ISA(exec.isa, decode_span<T>);
  if (p.taps > 1) {
    const auto transpose_filter = MK_BY_ISA(exec.isa, transpose_filter<T>);
    const int64_t grain = ceil_div(kGrainWords, words_per_row(p.cols));
    exec.parallel.run(p.row_begin, p.row_end, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<T[]> row(new T[p.cols]); // not initialised
      for (int64_t i = begin; i < end; ++i) {
        decode_span(windows.at(i * p.cols % p.period), p.words + i * words_per_row(p.cols), p.cols,
            row.get());
        transpose_filter(row.get(), p.cols / p.taps, p.taps, out + (i - p.row_begin) * p.cols);
      }
    });
    return;
  }
  parallel_spans({p.row_end - p.row_begin, p.cols}, exec.parallel, [&](const Span& s) {
    const T* row = windows.at((p.row_begin + s.row) * p.cols % p.period);
    decode_span(row + s.col, words + s.word, s.count, out + s.row * p.cols + s.col);
  });
}

} // namespace

void decode(const Decode& params, const Exec& exec) {
  switch (params.element_size) {
  case 2:
    return decode_as<uint16_t>(params, exec);
  case 4:
    return decode_as<uint32_t>(params, exec);
  case 8:
    return decode_as<uint64_t>(params, exec);
  }
}

} // namespace masked_kernels
