// Scores to packed masks: exact top-k by counting keys in ever narrower ranges, a threshold, n of
// m.
//
// Scores are compared as keys: 32-bit unsigned integers in the same order, equal where the scores
// are. |score| is the float's bits without the sign; a signed score flips its bits so that negative
// floats come first and in reverse.
#include "spans.h"
#include "target.h"

#include "masked_kernels/kernels.h"

#include <array>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

namespace masked_kernels {
namespace {

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
int64_t first_nan(const float* scores, int64_t count, const Parallel& parallel) {
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

// A pass over the scores counts the keys below a range and, bin by bin, those inside: bin b holds
// the keys lo + (b << shift) to lo + ((b + 1) << shift) - 1. Ranges do not reach past the largest
// key.
constexpr int64_t kBins = 1 << 11;

struct Range {
  uint32_t lo;
  int shift;

  uint32_t bin(uint32_t key) const { return (key - lo) >> shift; } // >= kBins outside
};
constexpr Range kWhole = {0, 21};

// The narrowest range that starts at `lo` and holds `hi`, moved down where it would reach too far.
Range range_of(uint32_t lo, uint32_t hi) {
  int shift = 0;
  while ((hi - lo) >> shift >= kBins)
    ++shift;
  const uint64_t last = (uint64_t{1} << 32) - (uint64_t{kBins} << shift);
  return {static_cast<uint32_t>(std::min<uint64_t>(lo, last)), shift};
}

struct Count {
  int64_t below = 0;
  bool nan = false;
  std::array<int64_t, kBins> bins = {};
};

template <bool kAbsolute>
MK_INLINE void count_keys_body(const float* scores, int64_t count, Range range, Count& total) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = key_of<kAbsolute>(scores[i]);
    total.below += key < range.lo;
    total.nan |= scores[i] != scores[i];
    if (const uint32_t bin = range.bin(key); bin < kBins)
      ++total.bins[bin];
  }
}

// Clears the lowest min(ties, set bits) bits of a word, and takes them off `ties`.
MK_INLINE uint32_t drop_lowest(uint32_t word, int64_t& ties) {
  const int64_t set = __builtin_popcount(word);
  if (ties >= set) {
    ties -= set;
    return 0;
  }
  for (; ties > 0; --ties)
    word &= word - 1;
  return word;
}

// bit = key >= cut, less the first `ties` keys that equal `cut`
template <bool kAbsolute>
MK_INLINE void cut_span_body(
    const float* scores, int64_t count, uint32_t cut, int64_t& ties, uint32_t* words) {
  for (int64_t i = 0; i < count; i += kWordBits, scores += kWordBits) {
    const int64_t bits = std::min(kWordBits, count - i);
    uint32_t above = 0, equal = 0;
    for (int64_t j = 0; j < bits; ++j) {
      const uint32_t key = key_of<kAbsolute>(scores[j]);
      above |= uint32_t{key > cut} << j;
      equal |= uint32_t{key == cut} << j;
    }
    *words++ = above | drop_lowest(equal, ties);
  }
}

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

template <bool kAbsolute>
void count_keys(const float* scores, int64_t count, Range range, Count& total) {
  count_keys_body<kAbsolute>(scores, count, range, total);
}
template <bool kAbsolute>
void cut_span(const float* scores, int64_t count, uint32_t cut, int64_t& ties, uint32_t* words) {
  cut_span_body<kAbsolute>(scores, count, cut, ties, words);
}
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

template <bool kAbsolute>
MK_AVX2 void count_keys(const float* scores, int64_t count, Range range, Count& total) {
  count_keys_body<kAbsolute>(scores, count, range, total);
}
template <bool kAbsolute>
MK_AVX2 void cut_span(
    const float* scores, int64_t count, uint32_t cut, int64_t& ties, uint32_t* words) {
  cut_span_body<kAbsolute>(scores, count, cut, ties, words);
}
MK_AVX2 bool threshold_span(const float* scores, int64_t count, float threshold, uint32_t* words) {
  return threshold_span_body(scores, count, threshold, words);
}
using scalar::nm_span;

} // namespace avx2

namespace avx512 {

constexpr int64_t kLanes = 16;

template <bool kAbsolute>
MK_AVX512 MK_INLINE __m512i keys_of(__m512i bits) {
  if (kAbsolute)
    return _mm512_slli_epi32(bits, 1);
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(kSignBit));
  bits = _mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(bits, sign), bits); // -0.0 ties with +0.0
  return _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign));
}

// The keys inside, few of all after a good guess, are squeezed into a small buffer without branches
// and counted when it is full.
template <bool kAbsolute>
MK_AVX512 void count_keys(const float* scores, int64_t count, Range range, Count& total) {
  constexpr int64_t kBuffer = 1024;
  uint32_t inside[kBuffer + kLanes];
  int64_t filled = 0;
  uint32_t nan = 0;
  const __m128i shift = _mm_cvtsi32_si128(range.shift);
  const __m512i lo = _mm512_set1_epi32(static_cast<int>(range.lo));
  const __m512i bins = _mm512_set1_epi32(kBins);
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto lanes = static_cast<__mmask16>(low_bits(count - i));
    const __m512i bits = _mm512_maskz_loadu_epi32(lanes, scores + i);
    const __m512i keys = keys_of<kAbsolute>(bits);
    const __m512i bin = _mm512_srl_epi32(_mm512_sub_epi32(keys, lo), shift);
    const __mmask16 hit = _mm512_mask_cmplt_epu32_mask(lanes, bin, bins);
    total.below += __builtin_popcount(_mm512_mask_cmplt_epu32_mask(lanes, keys, lo));
    nan |= _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
    _mm512_storeu_si512(inside + filled, _mm512_maskz_compress_epi32(hit, bin));
    filled += __builtin_popcount(hit);
    if (filled >= kBuffer || i + kLanes >= count) {
      for (int64_t j = 0; j < filled; ++j)
        ++total.bins[inside[j]];
      filled = 0;
    }
  }
  total.nan |= nan != 0;
}

template <bool kAbsolute>
MK_AVX512 void cut_span(
    const float* scores, int64_t count, uint32_t cut, int64_t& ties, uint32_t* words) {
  const __m512i cuts = _mm512_set1_epi32(static_cast<int>(cut));
  for (; count > 0; count -= kWordBits, scores += kWordBits) {
    const uint32_t lanes = low_bits(count);
    const auto low = static_cast<__mmask16>(lanes), high = static_cast<__mmask16>(lanes >> kLanes);
    const __m512i a = keys_of<kAbsolute>(_mm512_maskz_loadu_epi32(low, scores));
    const __m512i b = keys_of<kAbsolute>(_mm512_maskz_loadu_epi32(high, scores + kLanes));
    const uint32_t above = _mm512_mask_cmpgt_epu32_mask(low, a, cuts) |
                           uint32_t{_mm512_mask_cmpgt_epu32_mask(high, b, cuts)} << kLanes;
    const uint32_t equal = _mm512_mask_cmpeq_epi32_mask(low, a, cuts) |
                           uint32_t{_mm512_mask_cmpeq_epi32_mask(high, b, cuts)} << kLanes;
    *words++ = above | drop_lowest(equal, ties);
  }
}

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

// A range that holds the key of rank `drop` in all likelihood, from a sample: far enough around the
// sample's quantile that only one guess in 100 000 misses.
template <bool kAbsolute>
Range guess_range(const float* scores, int64_t count, int64_t drop) {
  constexpr int64_t kSample = 1 << 13;
  constexpr int64_t kMargin = 200; // 4.4 standard deviations of a rank in the sample
  if (count < 16 * kSample)
    return kWhole;
  std::vector<uint32_t> keys(kSample);
  for (int64_t i = 0; i < kSample; ++i)
    keys[i] = key_of<kAbsolute>(scores[count / kSample * i]);
  const auto middle = static_cast<int64_t>(static_cast<double>(drop) / count * kSample);
  const auto key_at = [&](int64_t rank) {
    std::nth_element(keys.begin(), keys.begin() + rank, keys.end());
    return keys[rank];
  };
  const uint32_t lo = middle < kMargin ? 0 : key_at(middle - kMargin);
  const uint32_t hi = middle >= kSample - kMargin ? ~0u : key_at(middle + kMargin);
  return range_of(lo, hi);
}

template <bool kAbsolute>
int64_t select_topk_as(const SelectTopk& p, const Exec& exec) {
  const Shape shape = joined(p.shape);
  const int64_t elements = shape.elements(), words = shape.words();
  if (elements == 0)
    return -1;

  // Tasks own consecutive words, the same ones in every pass, so that each knows how many equal
  // keys come before its own.
  const int64_t tasks =
      std::max<int64_t>(1, std::min(exec.parallel.threads(), words / kGrainWords));
  const auto first_word = [&](int64_t task) { return words * task / tasks; };
  const auto first_element = [&](int64_t task) {
    const int64_t word = first_word(task), row_words = words_per_row(shape.cols);
    return word / row_words * shape.cols + word % row_words * kWordBits;
  };
  const auto each_task = [&](const auto& fn) {
    exec.parallel.run(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        fn(task);
    });
  };

  // Narrows the range that holds the key of rank `drop` until its bins are single keys.
  const auto count_keys = MK_BY_ISA(exec.isa, count_keys<kAbsolute>);
  std::vector<Count> counts(tasks);
  Range range = guess_range<kAbsolute>(p.scores, elements, p.drop);
  uint32_t cut = 0;
  int64_t ties = 0; // keys that equal `cut` and are to drop
  for (;;) {
    each_task([&](int64_t task) {
      const int64_t begin = first_element(task), end = first_element(task + 1);
      counts[task] = {};
      count_keys(p.scores + begin, end - begin, range, counts[task]);
    });
    ties = p.drop;
    bool nan = false;
    for (const Count& count : counts) {
      ties -= count.below;
      nan |= count.nan;
    }
    if (nan)
      return first_nan(p.scores, elements, exec.parallel);
    if (p.drop >= elements) {
      std::fill_n(p.words, words, 0u);
      return -1;
    }
    int64_t bin = 0;
    for (; ties >= 0 && bin < kBins; ++bin) {
      int64_t size = 0;
      for (const Count& count : counts)
        size += count.bins[bin];
      if (ties < size)
        break;
      ties -= size;
    }
    if (ties < 0 || bin == kBins) {
      range = kWhole; // the guess missed
      continue;
    }
    cut = range.lo + (static_cast<uint32_t>(bin) << range.shift);
    if (range.shift == 0)
      break;
    range = range_of(cut, cut + ((1u << range.shift) - 1));
  }

  const auto cut_span = MK_BY_ISA(exec.isa, cut_span<kAbsolute>);
  std::vector<int64_t> task_ties(tasks); // the first ones are to drop, task by task
  for (int64_t task = 0; task < tasks; ++task) {
    task_ties[task] = std::min(ties, counts[task].bins[range.bin(cut)]);
    ties -= task_ties[task];
  }
  each_task([&](int64_t task) {
    for_each_span(shape, first_word(task), first_word(task + 1), [&](const Span& s) {
      cut_span(p.scores + s.element, s.count, cut, task_ties[task], p.words + s.word);
    });
  });
  return -1;
}

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

int64_t select_topk(const SelectTopk& params, const Exec& exec) {
  return params.absolute ? select_topk_as<true>(params, exec) : select_topk_as<false>(params, exec);
}

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
