// Vectors of floats as the compiler's own type: one source for every instruction set. Functions of
// it take their instructions from the MK_AVX2 or MK_AVX512 function that they are inlined into.
#pragma once

#include "target.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

// What is always inlined passes no vector, so no ABI is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace masked_kernels {

template <int kLanes>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
};

template <int kLanes>
using Floats = typename VectorOf<kLanes>::Floats;
template <int kLanes>
using Ints = typename VectorOf<kLanes>::Ints;

template <int kLanes>
MK_INLINE Floats<kLanes> splat(float value) {
  return Floats<kLanes>{} + value;
}

// Float arrays need no alignment. Of a `count` below kLanes, load fills up with 0.
template <int kLanes>
MK_INLINE Floats<kLanes> load(const float* from, int64_t count = kLanes) {
  Floats<kLanes> vector = {};
  if (count >= kLanes)
    std::memcpy(&vector, from, sizeof vector);
  else
    std::memcpy(&vector, from, count * sizeof(float));
  return vector;
}

template <int kLanes>
MK_INLINE void store(float* to, const Floats<kLanes>& vector, int64_t count = kLanes) {
  if (count >= kLanes)
    std::memcpy(to, &vector, sizeof vector);
  else
    std::memcpy(to, &vector, count * sizeof(float));
}

// The smaller, or the larger, of a and b in each lane; b where one is NaN. Where vectors are wide,
// one instruction, while GCC makes two of a comparison: no intrinsic, because the instruction set
// is that of the function which this is inlined into.
template <int kLanes>
MK_INLINE Floats<kLanes> min_of(const Floats<kLanes>& a, const Floats<kLanes>& b) {
  if constexpr (kLanes < 8) {
    return a < b ? a : b;
  } else {
    Floats<kLanes> least;
    asm("vminps %2, %1, %0" : "=v"(least) : "v"(a), "v"(b));
    return least;
  }
}

template <int kLanes>
MK_INLINE Floats<kLanes> max_of(const Floats<kLanes>& a, const Floats<kLanes>& b) {
  if constexpr (kLanes < 8) {
    return a > b ? a : b;
  } else {
    Floats<kLanes> most;
    asm("vmaxps %2, %1, %0" : "=v"(most) : "v"(a), "v"(b));
    return most;
  }
}

// Has a vector that a mask applies to loaded before: under the mask, the load would wait for it.
template <int kLanes>
MK_INLINE void keep_loaded(Floats<kLanes>& vector) {
  if constexpr (kLanes >= 8)
    asm("" : "+v"(vector));
}

// fn(count) for a vector of which `count` elements exist. Of a whole one the count is a constant,
// and nothing remains of what serves a part.
template <int kLanes, class Fn>
MK_INLINE void with_count(int64_t count, const Fn& fn) {
  if (count >= kLanes)
    fn(std::integral_constant<int64_t, kLanes>{});
  else
    fn(count);
}

// fn(i, count) for each vector of `length` elements: it begins with element i.
template <int kLanes, class Fn>
MK_INLINE void for_vectors(int64_t length, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    fn(i, std::integral_constant<int64_t, kLanes>{});
  if (i < length)
    fn(i, length - i);
}

// fn(i, vectors, count) for two vectors at a time, the last, or the last but part of one, alone.
template <int kLanes, class Fn>
MK_INLINE void for_vector_pairs(int64_t length, const Fn& fn) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes)
    fn(i, std::integral_constant<int, 2>{}, std::integral_constant<int64_t, kLanes>{});
  for_vectors<kLanes>(length - i, [&](int64_t rest, auto count) MK_INLINE_LAMBDA {
    fn(i + rest, std::integral_constant<int, 1>{}, count);
  });
}

} // namespace masked_kernels
