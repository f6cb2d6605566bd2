// From the pixels of all channels to planes and back.
#include "planes.h"
#include "square.h"

#if MK_X86
namespace masked_kernels {
namespace {

constexpr int64_t kSquare = Planes::kSquare;

// Pixels [begin, end), in squares.
MK_AVX2 void to_planes_range(
    const Planes& planes, const float* pixels, float* to, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; pixel += kSquare)
    for (int64_t channel = 0; channel < planes.channels; channel += kSquare)
      transpose_square(pixels + pixel * planes.channels + channel, planes.channels,
          to + channel * planes.stride() + pixel, planes.stride());
}

MK_AVX2 void from_planes_range(
    const Planes& planes, const float* from, float* pixels, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; pixel += kSquare)
    for (int64_t channel = 0; channel < planes.channels; channel += kSquare)
      transpose_square(from + channel * planes.stride() + pixel, planes.stride(),
          pixels + pixel * planes.channels + channel, planes.channels);
}

// fn(begin, end) of ranges of pixels
template <class Fn>
void parallel_pixels(const Planes& planes, const Parallel& parallel, const Fn& fn) {
  constexpr int64_t kGrain = 1 << 15, kVector = Planes::kVector; // floats worth waking a thread for
  parallel.run(0, planes.pixels() / kVector, ceil_div(kGrain, kVector * planes.channels + 1),
      [&](int64_t begin, int64_t end) { fn(begin * kVector, end * kVector); });
}

} // namespace

void to_planes(const Planes& planes, const float* pixels, float* to, const Exec& exec) {
  parallel_pixels(planes, exec.parallel,
      [&](int64_t begin, int64_t end) { to_planes_range(planes, pixels, to, begin, end); });
}

void from_planes(const Planes& planes, const float* from, float* pixels, const Exec& exec) {
  parallel_pixels(planes, exec.parallel,
      [&](int64_t begin, int64_t end) { from_planes_range(planes, from, pixels, begin, end); });
}

} // namespace masked_kernels
#endif
