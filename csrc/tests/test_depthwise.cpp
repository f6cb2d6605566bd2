// depthwise_conv2d, the epilogue and depthwise_grad against loops in double.
#include "testing.h"

#include <cmath>

using namespace testing;

namespace {

double activated(Activation activation, double x) {
  if (activation == Activation::gelu)
    return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  return activation == Activation::relu ? std::max(x, 0.0) : x;
}

// gain and shift [4, channels], the residual, and what they make of an output.
struct Finishing {
  std::vector<float> affine, residual;
  Activation activation;
  int64_t channels;

  Finishing(Activation activation, int64_t channels, int64_t outputs, Random& random)
      : affine(random.floats(4 * channels)), residual(random.floats(outputs)),
        activation(activation), channels(channels) {}

  Epilogue epilogue() const {
    const float* rows = affine.data();
    return {{rows, rows + channels}, {rows + 2 * channels, rows + 3 * channels}, activation,
        residual.data()};
  }
  double operator()(double v, int64_t at) const {
    const float* of = affine.data() + at % channels;
    const double before = of[0] * v + of[channels];
    return of[2 * channels] * activated(activation, before) + of[3 * channels] + residual[at];
  }
};

void test_finish(
    const Exec& exec, Activation activation, int64_t rows, int64_t channels, Random& random) {
  const Finishing finishing(activation, channels, rows * channels, random);
  const std::vector<float> before = random.floats(rows * channels);
  std::vector<float> y = before;
  finish(finishing.epilogue(), rows, channels, y.data(), exec);
  for (int64_t i = 0; i < rows * channels; ++i) {
    const double expected = finishing(before[i], i);
    CHECK(std::abs(y[i] - expected) <= 2e-6 * (1 + std::abs(expected)), name(exec.isa), rows,
        channels, static_cast<int>(activation), i, y[i], expected);
  }
}

void test_conv(const Exec& exec, DepthwiseConv2d p, Activation activation, Random& random) {
  const int64_t height = p.out_height(), width = p.out_width();
  const Shape shape{p.channels, p.kernel_h * p.kernel_w};
  const std::vector<float> x = random.floats(p.batch * p.height * p.width * p.channels);
  const std::vector<float> values = random.floats(p.period);
  const std::vector<uint32_t> words = random.words(shape);
  std::vector<float> y(p.batch * height * width * p.channels, NAN);
  const Finishing finishing(activation, p.channels, y.size(), random);
  p.x = x.data(), p.values = values.data(), p.words = words.data(), p.y = y.data();
  p.epilogue = finishing.epilogue();
  depthwise_conv2d(p, exec);
  for (int64_t at = 0; at < static_cast<int64_t>(y.size()); ++at) {
    const int64_t c = at % p.channels, j = at / p.channels % width;
    const int64_t i = at / p.channels / width % height, b = at / p.channels / width / height;
    double sum = 0, size = 1;
    for (int64_t tap = 0; tap < shape.cols; ++tap) {
      const int64_t row = i + tap / p.kernel_w - p.pad_h, col = j + tap % p.kernel_w - p.pad_w;
      if (row < 0 || row >= p.height || col < 0 || col >= p.width || !bit(words, shape, c, tap))
        continue;
      const double term = double{x[((b * p.height + row) * p.width + col) * p.channels + c]} *
                          values[(c * shape.cols + tap) % p.period];
      sum += term;
      size += std::abs(term);
    }
    const double expected = finishing(sum, at);
    CHECK(std::abs(y[at] - expected) <= 1e-5 * size, name(exec.isa), exec.parallel.threads(),
        p.batch, p.channels, p.height, p.width, p.kernel_h, p.kernel_w, at, y[at], expected);
  }
}

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
    for (const Activation activation : {Activation::identity, Activation::gelu, Activation::relu})
      for (const int64_t channels : {1, 4, 15, 16, 17, 50}) {
        test_finish(exec, activation, 5, channels, random);
        test_finish(exec, activation, 0, channels, random);
        for (const int64_t kernel : {1, 3, 4, 5, 7, 9, 11})
          test_conv(exec,
              {nullptr, nullptr, 7 + kernel, nullptr, 2, channels, 6, 11, kernel, kernel,
                  kernel / 2, kernel / 2, nullptr, {}},
              activation, random);
      }
    const auto convolve = [&](int64_t batch, int64_t channels, int64_t height, int64_t width,
                              int64_t kernel_h, int64_t kernel_w, int64_t pad_h, int64_t pad_w) {
      test_conv(exec,
          {nullptr, nullptr, channels * kernel_h * kernel_w, nullptr, batch, channels, height,
              width, kernel_h, kernel_w, pad_h, pad_w, nullptr, {}},
          Activation::gelu, random);
    };
    convolve(0, 4, 5, 5, 3, 3, 1, 1);
    convolve(1, 16, 1, 1, 5, 5, 2, 2);
    convolve(3, 40, 2, 3, 3, 9, 1, 4);
    convolve(1, 20, 70, 41, 5, 3, 4, 0);
    convolve(1, 3, 300, 120, 5, 5, 2, 2); // several bands
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
