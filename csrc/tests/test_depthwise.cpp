// depthwise_grad against loops in double.
#include "testing.h"

#include <cmath>

using namespace testing;

namespace {

void test_grad(const Exec& exec, DepthwiseGrad p, Random& random) {
  const int64_t height = p.out_height(), width = p.out_width(), taps = p.kernel;
  const std::vector<float> x = random.floats(p.batch * p.height * p.width * p.channels);
  const std::vector<float> grad_y = random.floats(p.batch * height * width * p.channels);
  std::vector<float> grad(p.channels * taps * taps, NAN);
  p.x = x.data(), p.grad_y = grad_y.data(), p.grad_weight = grad.data();
  depthwise_grad(p, exec);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t r = 0; r < taps; ++r)
      for (int64_t s = 0; s < taps; ++s) {
        double expected = 0, size = 1;
        for (int64_t b = 0; b < p.batch; ++b)
          for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j) {
              const int64_t row = i + r - p.pad_h, col = j + s - p.pad_w;
              if (row < 0 || row >= p.height || col < 0 || col >= p.width)
                continue;
              const double term =
                  double{x[((b * p.height + row) * p.width + col) * p.channels + c]} *
                  grad_y[((b * height + i) * width + j) * p.channels + c];
              expected += term;
              size += std::abs(term);
            }
        const float got = grad[(c * taps + r) * taps + s];
        CHECK(std::abs(got - expected) <= 1e-6 * size, name(exec.isa), exec.parallel.threads(),
            p.batch, p.channels, p.height, p.width, taps, p.pad_h, p.pad_w, c, r, s, got, expected);
      }
}

} // namespace

int main() {
  for_each_exec([](const Exec& exec) {
    Random random;
    const auto test = [&](int64_t batch, int64_t channels, int64_t height, int64_t width,
                          int64_t kernel, int64_t pad_h, int64_t pad_w) {
      test_grad(exec,
          {nullptr, nullptr, batch, channels, height, width, kernel, pad_h, pad_w, nullptr},
          random);
    };
    for (const int64_t kernel : {3, 5, 7, 9})
      for (const int64_t channels : {1, 4, 15, 16, 17, 50}) {
        test(2, channels, 6, 7, kernel, kernel / 2, kernel / 2);
        test(1, channels, 11, 9, kernel, 0, kernel);
        test(3, channels, 1, 1, kernel, kernel / 2, kernel / 2);
      }
    test(0, 5, 4, 4, 3, 1, 1);
    test(1, 3, 600, 40, 3, 1, 1); // several bands
  });
}
