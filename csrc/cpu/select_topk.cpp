// Scores to packed masks: exact top-k, in one pass over the scores.
//
// A guess says between which two keys the threshold lies in all likelihood. The pass writes a bit
// for every key above that band and puts the few scores inside it aside; counting among those finds
// the threshold, and their bits are set last. The first guess is what surrounds the threshold of
// the last selection, where that is known; the second is drawn from a sample. Where a band misses,
// or holds too many scores to put aside (equal ones, say), the next is tried; in the end all scores
// are counted and a last pass writes the words.
#include "scores.h"
#include "spans.h"

#include "masked_kernels/kernels.h"

#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

namespace masked_kernels {
namespace {

// Counting: the keys below a range and, bin by bin, those inside. Bin b holds the keys
// lo + (b << shift) to lo + ((b + 1) << shift) - 1. Ranges do not reach past the largest key.
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

// How far the pass asks for scores ahead, as the hardware itself stops at the end of a page.
constexpr int64_t kAhead = 1024;

// Keys lo to hi.
struct Band {
  uint32_t lo, hi;
};

// A word of the mask and which of its scores were put aside.
struct Gap {
  uint32_t word, bits;
};

// What the pass puts aside of consecutive words, in flat order. Kernels may write as many scores
// past the end as a word has, while it is not full.
struct Aside {
  std::unique_ptr<float[]> scores; // not initialised: most of it is never used
  std::unique_ptr<Gap[]> gaps;
  float* scores_end;
  Gap* gaps_end;
  const float* limit;
  int64_t above = 0; // keys above the band
  bool nan = false;

  explicit Aside(int64_t capacity)
      : scores(new float[capacity + 2 * kWordBits]), gaps(new Gap[capacity + 2 * kWordBits]),
        scores_end(scores.get()), gaps_end(gaps.get()), limit(scores.get() + capacity) {}

  int64_t count() const { return scores_end - scores.get(); }
  bool full() const { return scores_end >= limit; }
};

// Puts a word's scores aside that lie inside the band.
MK_INLINE void put(
    const float* scores, uint32_t word, uint32_t above, uint32_t inside, Aside& aside) {
  aside.above += __builtin_popcount(above);
  *aside.gaps_end = {word, inside};
  aside.gaps_end += inside != 0;
  for (; inside != 0; inside &= inside - 1)
    *aside.scores_end++ = scores[__builtin_ctz(inside)];
}

// Words of the keys above the band, the first of them number `word`; stops when `aside` is full.
template <bool kAbsolute>
MK_INLINE void split_span_body(
    const float* scores, int64_t count, Band band, uint32_t word, uint32_t* words, Aside& aside) {
  for (int64_t i = 0; i < count && !aside.full(); i += kWordBits, scores += kWordBits, ++word) {
    const int64_t bits = std::min(kWordBits, count - i);
    uint32_t above = 0, inside = 0;
    for (int64_t j = 0; j < bits; ++j) {
      const uint32_t key = key_of<kAbsolute>(scores[j]);
      above |= uint32_t{key > band.hi} << j;
      inside |= uint32_t{band.lo <= key && key <= band.hi} << j;
      aside.nan |= scores[j] != scores[j];
    }
    put(scores, word, above, inside, aside);
    *words++ = above;
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

// Sets the bits of the scores put aside, `kept` in their own order, in words that have the others.
// Reads two words of `kept` at once.
template <class Deposit>
MK_INLINE void fill_gaps_body(
    const Aside& aside, const uint32_t* kept, uint32_t* words, const Deposit& deposit) {
  int64_t i = 0;
  for (const Gap* gap = aside.gaps.get(); gap < aside.gaps_end; ++gap) {
    const uint32_t* at = kept + i / kWordBits;
    const uint64_t bits = at[0] | uint64_t{at[1]} << kWordBits;
    words[gap->word] |= deposit(static_cast<uint32_t>(bits >> i % kWordBits), gap->bits);
    i += __builtin_popcount(gap->bits);
  }
}

namespace scalar {

template <bool kAbsolute>
void count_keys(const float* scores, int64_t count, Range range, Count& total) {
  count_keys_body<kAbsolute>(scores, count, range, total);
}
template <bool kAbsolute>
void split_span(
    const float* scores, int64_t count, Band band, uint32_t word, uint32_t* words, Aside& aside) {
  split_span_body<kAbsolute>(scores, count, band, word, words, aside);
}
template <bool kAbsolute>
void cut_span(const float* scores, int64_t count, uint32_t cut, int64_t& ties, uint32_t* words) {
  cut_span_body<kAbsolute>(scores, count, cut, ties, words);
}

void fill_gaps(const Aside& aside, const uint32_t* kept, uint32_t* words) {
  fill_gaps_body(aside, kept, words, [](uint32_t bits, uint32_t places) {
    uint32_t word = 0;
    for (; places != 0; places &= places - 1, bits >>= 1)
      word |= bits & 1 ? places & -places : 0;
    return word;
  });
}

} // namespace scalar

#if MK_X86
namespace avx2 {

template <bool kAbsolute>
MK_AVX2 void count_keys(const float* scores, int64_t count, Range range, Count& total) {
  count_keys_body<kAbsolute>(scores, count, range, total);
}
// Bit j of a word = a[j] > b, of 32 keys and a key in all lanes.
struct Keys {
  __m256i at[4];
};
MK_AVX2 MK_INLINE uint32_t greater(const Keys& a, __m256i b) {
  const __m256i sign = _mm256_set1_epi32(static_cast<int>(kSignBit)); // compares unsigned numbers
  uint32_t word = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i lanes =
        _mm256_cmpgt_epi32(_mm256_xor_si256(a.at[i], sign), _mm256_xor_si256(b, sign));
    word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes))) << 8 * i;
  }
  return word;
}
MK_AVX2 MK_INLINE uint32_t equal(const Keys& a, __m256i b) {
  uint32_t word = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 lanes = _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.at[i], b));
    word |= static_cast<uint32_t>(_mm256_movemask_ps(lanes)) << 8 * i;
  }
  return word;
}
template <bool kAbsolute>
MK_AVX2 MK_INLINE Keys load_keys(const float* scores) {
  Keys keys;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    keys.at[i] =
        keys_of<kAbsolute>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scores + 8 * i)));
  return keys;
}

template <bool kAbsolute>
MK_AVX2 void split_span(
    const float* scores, int64_t count, Band band, uint32_t word, uint32_t* words, Aside& aside) {
  const __m256i lo = _mm256_set1_epi32(static_cast<int>(band.lo));
  const __m256i hi = _mm256_set1_epi32(static_cast<int>(band.hi));
  __m256 nan = _mm256_setzero_ps();
  for (; count >= kWordBits && !aside.full(); count -= kWordBits, scores += kWordBits) {
    _mm_prefetch(scores + kAhead, _MM_HINT_T0);
    _mm_prefetch(scores + kAhead + kWordBits / 2, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kWordBits; i += 16)
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(_mm256_loadu_ps(scores + i),
                                  _mm256_loadu_ps(scores + i + 8), _CMP_UNORD_Q));
    const Keys keys = load_keys<kAbsolute>(scores);
    const uint32_t above = greater(keys, hi);
    const uint32_t inside = (greater(keys, lo) | equal(keys, lo)) & ~above;
    put(scores, word++, above, inside, aside);
    *words++ = above;
  }
  aside.nan |= _mm256_movemask_ps(nan) != 0;
  split_span_body<kAbsolute>(scores, count, band, word, words, aside);
}
template <bool kAbsolute>
MK_AVX2 void cut_span(
    const float* scores, int64_t count, uint32_t cut, int64_t& ties, uint32_t* words) {
  const __m256i cuts = _mm256_set1_epi32(static_cast<int>(cut));
  for (; count >= kWordBits; count -= kWordBits, scores += kWordBits) {
    const Keys keys = load_keys<kAbsolute>(scores);
    *words++ = greater(keys, cuts) | drop_lowest(equal(keys, cuts), ties);
  }
  cut_span_body<kAbsolute>(scores, count, cut, ties, words);
}

struct Deposit {
  MK_AVX2 uint32_t operator()(uint32_t bits, uint32_t places) const {
    return _pdep_u32(bits, places);
  }
};
MK_AVX2 void fill_gaps(const Aside& aside, const uint32_t* kept, uint32_t* words) {
  fill_gaps_body(aside, kept, words, Deposit{});
}

} // namespace avx2

namespace avx512 {

using avx2::fill_gaps;

constexpr int64_t kLanes = 16;

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
MK_AVX512 void split_span(
    const float* scores, int64_t count, Band band, uint32_t word, uint32_t* words, Aside& aside) {
  const __m512i lo = _mm512_set1_epi32(static_cast<int>(band.lo));
  const __m512i hi = _mm512_set1_epi32(static_cast<int>(band.hi));
  // Of `aside`, in registers.
  float* next_score = aside.scores_end;
  Gap* next_gap = aside.gaps_end;
  int64_t all_above = 0;
  uint32_t nan = 0;
  for (; count > 0 && next_score < aside.limit; count -= kWordBits, scores += kWordBits) {
    _mm_prefetch(scores + kAhead, _MM_HINT_T0);
    _mm_prefetch(scores + kAhead + kLanes, _MM_HINT_T0);
    const uint32_t lanes = low_bits(count);
    const auto low = static_cast<__mmask16>(lanes), high = static_cast<__mmask16>(lanes >> kLanes);
    const __m512i a = _mm512_maskz_loadu_epi32(low, scores);
    const __m512i b = _mm512_maskz_loadu_epi32(high, scores + kLanes);
    const __m512i a_keys = keys_of<kAbsolute>(a), b_keys = keys_of<kAbsolute>(b);
    const uint32_t above = _mm512_mask_cmpgt_epu32_mask(low, a_keys, hi) |
                           uint32_t{_mm512_mask_cmpgt_epu32_mask(high, b_keys, hi)} << kLanes;
    const __mmask16 a_in = _mm512_mask_cmpge_epu32_mask(low, a_keys, lo) & ~above;
    const __mmask16 b_in = _mm512_mask_cmpge_epu32_mask(high, b_keys, lo) & ~(above >> kLanes);
    const uint32_t inside = a_in | uint32_t{b_in} << kLanes;
    nan |= _mm512_cmp_ps_mask(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _CMP_UNORD_Q);
    _mm512_storeu_si512(next_score, _mm512_maskz_compress_epi32(a_in, a));
    next_score += __builtin_popcount(a_in);
    _mm512_storeu_si512(next_score, _mm512_maskz_compress_epi32(b_in, b));
    next_score += __builtin_popcount(b_in);
    *next_gap = {word++, inside};
    next_gap += inside != 0;
    all_above += __builtin_popcount(above);
    *words++ = above;
  }
  aside.scores_end = next_score;
  aside.gaps_end = next_gap;
  aside.above += all_above;
  aside.nan |= nan != 0;
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

} // namespace avx512
#endif

struct Slice {
  const float* scores;
  int64_t count;
};

// The smallest key to keep; `ties[i]` keys of slice i equal it and are dropped all the same.
struct Cut {
  uint32_t key;
  std::vector<int64_t> ties;
};

// The cut that drops `drop` of the scores in all slices, fewer than there are; nothing if one is
// NaN. Narrows the range that holds the key of that rank, at first `range`, until bins are keys.
template <bool kAbsolute>
std::optional<Cut> find_cut(
    const std::vector<Slice>& slices, int64_t drop, Range range, const Exec& exec) {
  const auto count_keys = MK_BY_ISA(exec.isa, count_keys<kAbsolute>);
  std::vector<Count> counts(slices.size());
  for (;;) {
    exec.parallel.run(0, slices.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        counts[i] = {};
        count_keys(slices[i].scores, slices[i].count, range, counts[i]);
      }
    });
    int64_t ties = drop;
    for (const Count& count : counts) {
      ties -= count.below;
      if (count.nan)
        return std::nullopt;
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
    const uint32_t key = range.lo + (static_cast<uint32_t>(bin) << range.shift);
    if (range.shift > 0) {
      range = range_of(key, key + ((1u << range.shift) - 1));
      continue;
    }
    Cut cut{key, {}};
    for (const Count& count : counts) {
      cut.ties.push_back(std::min(ties, count.bins[bin]));
      ties -= cut.ties.back();
    }
    return cut;
  }
}

// The band that holds the key of rank `drop` but for one case in a million: that far around the
// quantile of a sample. Nothing if a score of the sample is NaN.
template <bool kAbsolute>
std::optional<Band> sample_band(
    const float* scores, int64_t count, int64_t drop, int64_t sample_size, Isa isa) {
  // Whole cache lines, spread by the golden ratio: evenly, and in step with no row length.
  constexpr int64_t kLine = 16;
  std::vector<float> sample(sample_size);
  for (int64_t i = 0; i < sample_size / kLine; ++i) {
    const uint64_t turn = static_cast<uint32_t>(i) * 0x9e3779b9u; // in units of 2^-32
    const int64_t line = static_cast<int64_t>(turn * (count / kLine) >> 32);
    std::copy_n(scores + line * kLine, kLine, &sample[i * kLine]);
  }
  const auto middle = static_cast<int64_t>(static_cast<double>(drop) / count * sample_size);
  const auto margin = static_cast<int64_t>(2.5 * std::sqrt(sample_size)); // 5 standard deviations
  const std::vector<Slice> slices = {{sample.data(), sample_size}};
  const Serial one_thread;
  const Exec exec{isa, one_thread};
  Band band = {0, ~0u};
  if (middle >= margin) {
    const auto cut = find_cut<kAbsolute>(slices, middle - margin, kWhole, exec);
    if (!cut)
      return std::nullopt;
    band.lo = cut->key;
  }
  if (middle + margin < sample_size) {
    const auto cut = find_cut<kAbsolute>(slices, middle + margin, kWhole, exec);
    if (!cut)
      return std::nullopt;
    band.hi = cut->key;
  }
  return band;
}

template <bool kAbsolute>
class Selection {
 public:
  Selection(const SelectTopk& params, const Exec& exec)
      : p_(params), exec_(exec), shape_(joined(params.shape)), words_(shape_.words()),
        tasks_(std::max<int64_t>(1, std::min(exec.parallel.threads(), words_ / kGrainWords))) {}

  // False if a score is NaN.
  bool run() const {
    const bool warm = p_.last && p_.last->reach >= 0;
    const Outcome outcome = warm ? follow(*p_.last) : Outcome::outside;
    if (outcome == Outcome::done || outcome == Outcome::nan)
      return outcome == Outcome::done;
    const auto key = search();
    if (key && p_.last)
      *p_.last = {*key, warm ? p_.last->reach : kFirstReach};
    return key.has_value();
  }

 private:
  static constexpr int64_t kMostSampled = 1 << 16, kLeastSampled = 1 << 10;
  // Of a LastCut. The first is about a hundredth of a key's value, more than a step of training.
  static constexpr int kFirstReach = 18, kLeastReach = 4, kMostReach = 28;

  enum class Outcome { done, nan, outside, full };
  struct Split {
    Outcome outcome;
    uint32_t key = 0;   // the threshold
    int64_t inside = 0; // scores that were put aside
  };

  // Looks around the last threshold, and makes of `last` what is to be tried next time: with such a
  // reach that the threshold lies within and few scores do.
  Outcome follow(LastCut& last) const {
    const uint32_t distance = 1u << last.reach;
    const Band band = {
        last.key - std::min(last.key, distance), last.key + std::min(~last.key, distance)};
    const int64_t few = std::max<int64_t>(32, shape_.elements() / 64);
    const Split found = split(band, 4 * few / tasks_);
    if (found.outcome == Outcome::done)
      last.key = found.key;
    if (found.outcome == Outcome::outside)
      last.reach = std::min(last.reach + 2, kMostReach);
    if (found.outcome == Outcome::full || found.inside > few)
      last.reach = std::max(last.reach - 1, kLeastReach);
    return found.outcome;
  }

  // The threshold of scores of which nothing is known, or nothing if one is NaN.
  std::optional<uint32_t> search() const {
    const int64_t elements = shape_.elements();
    // The rarer the scores inside the band, the larger the sample; this size costs the least.
    const int64_t sample_size = std::min(elements / 32, kMostSampled);
    if (sample_size < kLeastSampled)
      return count(kWhole);
    const auto band = sample_band<kAbsolute>(p_.scores, elements, p_.drop, sample_size, exec_.isa);
    if (!band)
      return std::nullopt;
    const int64_t expected = 5 / std::sqrt(sample_size) * elements / tasks_;
    const Split found = split(*band, 4 * expected);
    switch (found.outcome) {
    case Outcome::done:
      return found.key;
    case Outcome::nan:
      return std::nullopt;
    default:
      return count(range_of(band->lo, band->hi));
    }
  }

  // Tasks own consecutive words, the same ones in every pass, so that each knows how many equal
  // keys come before its own.
  int64_t first_word(int64_t task) const { return words_ * task / tasks_; }

  Slice slice(int64_t task) const {
    const int64_t begin = first_element(task);
    return {p_.scores + begin, first_element(task + 1) - begin};
  }

  int64_t first_element(int64_t task) const {
    const int64_t word = first_word(task), row_words = words_per_row(shape_.cols);
    return word / row_words * shape_.cols + word % row_words * kWordBits;
  }

  template <class Fn>
  void each_task(const Fn& fn) const {
    exec_.parallel.run(0, tasks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        fn(task);
    });
  }

  template <class Fn>
  void each_span(int64_t task, const Fn& fn) const {
    for_each_span(shape_, first_word(task), first_word(task + 1), fn);
  }

  // One pass over the scores, where few of them lie inside the band and the threshold among them.
  Split split(Band band, int64_t capacity) const {
    const auto split_span = MK_BY_ISA(exec_.isa, split_span<kAbsolute>);
    const auto cut_span = MK_BY_ISA(exec_.isa, cut_span<kAbsolute>);
    const auto fill_gaps = MK_BY_ISA(exec_.isa, fill_gaps);
    std::vector<Aside> asides;
    for (int64_t task = 0; task < tasks_; ++task)
      asides.emplace_back(capacity);
    each_task([&](int64_t task) {
      Aside aside = std::move(asides[task]); // threads must not share a cache line
      each_span(task, [&](const Span& s) {
        split_span(p_.scores + s.element, s.count, band,
            static_cast<uint32_t>(s.word - first_word(task)), p_.words + s.word, aside);
      });
      asides[task] = std::move(aside);
    });

    int64_t below = shape_.elements(), inside = 0;
    std::vector<Slice> slices;
    for (const Aside& aside : asides) {
      if (aside.nan)
        return {Outcome::nan};
      if (aside.full())
        return {Outcome::full};
      below -= aside.above + aside.count();
      inside += aside.count();
      slices.push_back({aside.scores.get(), aside.count()});
    }
    if (p_.drop < below || p_.drop >= below + inside)
      return {Outcome::outside};

    const auto cut =
        find_cut<kAbsolute>(slices, p_.drop - below, range_of(band.lo, band.hi), exec_);
    each_task([&](int64_t task) {
      const Aside& aside = asides[task];
      std::vector<uint32_t> kept(words_per_row(aside.count()) + 1);
      int64_t ties = cut->ties[task];
      cut_span(aside.scores.get(), aside.count(), cut->key, ties, kept.data());
      fill_gaps(aside, kept.data(), p_.words + first_word(task));
    });
    return {Outcome::done, cut->key, inside};
  }

  // The threshold by several passes over the scores, whatever they are; nothing if one is NaN.
  std::optional<uint32_t> count(Range range) const {
    std::vector<Slice> slices;
    for (int64_t task = 0; task < tasks_; ++task)
      slices.push_back(slice(task));
    const auto cut = find_cut<kAbsolute>(slices, p_.drop, range, exec_);
    if (!cut)
      return std::nullopt;
    const auto cut_span = MK_BY_ISA(exec_.isa, cut_span<kAbsolute>);
    each_task([&](int64_t task) {
      int64_t ties = cut->ties[task];
      each_span(task, [&](const Span& s) {
        cut_span(p_.scores + s.element, s.count, cut->key, ties, p_.words + s.word);
      });
    });
    return cut->key;
  }

  const SelectTopk& p_;
  const Exec& exec_;
  const Shape shape_;
  const int64_t words_, tasks_;
};

} // namespace

int64_t select_topk(const SelectTopk& p, const Exec& exec) {
  const int64_t elements = p.shape.elements();
  if (p.drop < elements) {
    if (p.absolute ? Selection<true>(p, exec).run() : Selection<false>(p, exec).run())
      return -1;
  } else {
    std::fill_n(p.words, p.shape.words(), 0u);
  }
  return first_nan(p.scores, elements, exec.parallel);
}

void select_topk_many(const SelectTopk* params, int64_t count, int64_t* nans, const Exec& exec) {
  // Large tensors occupy all threads one by one. Of the others, laid end to end, a thread takes
  // those that start in its part.
  constexpr int64_t kLarge = 1 << 20;
  std::vector<std::pair<int64_t, int64_t>> small; // start, index
  int64_t end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t elements = params[i].shape.elements();
    if (elements >= kLarge) {
      nans[i] = select_topk(params[i], exec);
    } else {
      small.emplace_back(end, i);
      end += elements + 1; // so that empty ones have a place, too
    }
  }
  const Serial one_thread;
  exec.parallel.run(0, end, kGrainWords * kWordBits, [&](int64_t part, int64_t part_end) {
    for (const auto& [start, i] : small)
      if (part <= start && start < part_end)
        nans[i] = select_topk(params[i], {exec.isa, one_thread});
  });
}

} // namespace masked_kernels
