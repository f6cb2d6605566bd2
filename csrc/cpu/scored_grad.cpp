// The gradient of scores from the gradient of the effective weight.
#include "target.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <vector>

namespace masked_kernels {
namespace {

struct Run {
  float* grad;
  const float* values;
  const float* scores;
  float scale;
  int64_t count;
};

MK_INLINE void scale_run_body(const Run& run) {
  if (run.scores == nullptr) {
    for (int64_t i = 0; i < run.count; ++i)
      run.grad[i] *= run.scale * run.values[i];
    return;
  }
  for (int64_t i = 0; i < run.count; ++i) {
    const float score = run.scores[i];
    const float sign = score > 0 ? 1.0f : score < 0 ? -1.0f : 0.0f;
    run.grad[i] *= run.scale * run.values[i] * sign;
  }
}

namespace scalar {
void scale_run(const Run& run) {
  scale_run_body(run);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
MK_AVX2 void scale_run(const Run& run) {
  scale_run_body(run);
}
} // namespace avx2

namespace avx512 {
MK_AVX512 void scale_run(const Run& run) {
  scale_run_body(run);
}
} // namespace avx512
#endif

constexpr int64_t kGrain = 1 << 15;

} // namespace

void scored_grad(const ScoredGrad& p, const Exec& exec) {
  if (p.count == 0)
    return;
  // A short prototype is repeated first: runs of its own length would be too short for vectors.
  std::vector<float> repeated;
  const float* values = p.values;
  int64_t period = p.period;
  if (period < std::min<int64_t>(p.count, 1024)) {
    const int64_t times = (1024 + period - 1) / period;
    for (int64_t i = 0; i < times; ++i)
      repeated.insert(repeated.end(), p.values, p.values + period);
    values = repeated.data();
    period *= times;
  }
  const auto scale_run = MK_BY_ISA(exec.isa, scale_run);
  exec.parallel.run(0, p.count, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t start = begin % period, count = std::min(period - start, end - begin);
      scale_run(
          {p.grad + begin, values + start, p.scores ? p.scores + begin : nullptr, p.scale, count});
      begin += count;
    }
  });
}

} // namespace masked_kernels
