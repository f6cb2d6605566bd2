// The epilogue of outputs that a library has computed.
#include "epilogue.h"

namespace masked_kernels {
namespace {

struct Rows {
  const Epilogue& epilogue;
  int64_t channels;
  float* y;

  template <int kLanes>
  MK_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row)
      for_vectors<kLanes>(channels, [&](int64_t channel, auto count) MK_INLINE_LAMBDA {
        const int64_t at = row * channels + channel;
        Floats<kLanes> v[] = {load<kLanes>(y + at, count)};
        Finish<kLanes>(epilogue, channel, count)(v, at);
        store<kLanes>(y + at, v[0], count);
      });
  }
};

namespace scalar {
void finish_rows(const Rows& rows, int64_t begin, int64_t end) {
  rows.run<4>(begin, end);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
MK_AVX2 void finish_rows(const Rows& rows, int64_t begin, int64_t end) {
  rows.run<8>(begin, end);
}
} // namespace avx2

namespace avx512 {
MK_AVX512 void finish_rows(const Rows& rows, int64_t begin, int64_t end) {
  rows.run<16>(begin, end);
}
} // namespace avx512
#endif

} // namespace

void finish(const Epilogue& epilogue, int64_t rows, int64_t channels, float* y, const Exec& exec) {
  constexpr int64_t kGrain = 1 << 14; // outputs worth waking a thread for
  const auto finish_rows = MK_BY_ISA(exec.isa, finish_rows);
  exec.parallel.run(0, rows, ceil_div(kGrain, std::max<int64_t>(channels, 1)),
      [&](int64_t begin, int64_t end) { finish_rows({epilogue, channels, y}, begin, end); });
}

} // namespace masked_kernels
