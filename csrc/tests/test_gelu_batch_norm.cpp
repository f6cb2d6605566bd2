// GELU and BatchNorm in one, against loops in double.
#include "testing.h"

#include <cmath>

using namespace testing;

namespace {

double cdf(double x) {
  return std::erfc(-x / std::sqrt(2.0)) / 2;
}

double gelu(double x) {
  return x * cdf(x);
}

double gelu_slope(double x) {
  return cdf(x) + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0));
}

// Around 0, where GELU bends, and far from it, where it must be 0 or x.
void test_gelu(const Exec& exec) {
  std::vector<float> x;
  for (int i = -20'000; i <= 20'000; ++i)
    x.push_back(i * 1e-3f);
  x.insert(x.end(), {-1e30f, -1e4f, 1e4f, 1e30f, 0.0f, -0.0f, 1e-30f});
  const auto pixels = static_cast<int64_t>(x.size());
  const float zero = 0, one = 1;
  const BatchNorm p{x.data(), pixels, 1, &zero, &one, nullptr, nullptr, 0.0f};
  std::vector<float> y(pixels, NAN), slope(pixels, NAN), ones(pixels, 1.0f);
  float grad_weight, grad_bias;
  gelu_batch_norm(p, nullptr, y.data(), exec);
  gelu_batch_norm_grads(p, ones.data(), false, slope.data(), &grad_weight, &grad_bias, exec);
  for (int64_t i = 0; i < pixels; ++i) {
    const double bound = 1.2e-7 * (1 + std::abs(x[i]));
    CHECK(std::abs(y[i] - gelu(x[i])) <= bound, name(exec.isa), x[i], y[i], gelu(x[i]));
    if (std::abs(x[i]) < 0.3f) // an error of so many units in the last place, however small
      CHECK(std::abs(y[i] - gelu(x[i])) <= 4e-7 * std::abs(gelu(x[i])), name(exec.isa), x[i], y[i]);
    // A step of training multiplies the slope with gradients that may be as small as this.
    CHECK(std::fpclassify(slope[i] * 1e-18f) != FP_SUBNORMAL, name(exec.isa), x[i], slope[i]);
    if (std::abs(x[i]) < 1e4f)
      CHECK(std::abs(slope[i] - gelu_slope(x[i])) <= bound, name(exec.isa), x[i], slope[i]);
  }
}

void test_norm(const Exec& exec, int64_t pixels, int64_t channels, float offset, Random& random) {
  std::vector<float> x = random.floats(pixels * channels);
  for (float& value : x)
    value += offset;
  const std::vector<float> grad_y = random.floats(pixels * channels);
  const std::vector<float> residual = random.floats(pixels * channels);
  const std::vector<float> weight = random.floats(channels), bias = random.floats(channels);
  std::vector<float> mean(channels, NAN), var(channels, NAN), y(x.size(), NAN);
  std::vector<float> grad_weight(channels, NAN), grad_bias(channels, NAN), grad_x(x.size(), NAN);
  const float eps = 1e-3f;

  gelu_stats(x.data(), pixels, channels, mean.data(), var.data(), exec);
  const BatchNorm p{
      x.data(), pixels, channels, mean.data(), var.data(), weight.data(), bias.data(), eps};
  gelu_batch_norm(p, residual.data(), y.data(), exec);
  gelu_batch_norm_grads(
      p, grad_y.data(), true, grad_x.data(), grad_weight.data(), grad_bias.data(), exec);

  for (int64_t c = 0; c < channels; ++c) {
    double m = 0, v = 0, gw = 0, gb = 0;
    for (int64_t i = c; i < pixels * channels; i += channels)
      m += gelu(x[i]) / pixels;
    for (int64_t i = c; i < pixels * channels; i += channels)
      v += (gelu(x[i]) - m) * (gelu(x[i]) - m) / pixels;
    const double inverse = 1 / std::sqrt(v + eps), size = 1 + std::abs(offset);
    const auto normalised = [&](int64_t i) { return (gelu(x[i]) - m) * inverse; };
    for (int64_t i = c; i < pixels * channels; i += channels) {
      gw += grad_y[i] * normalised(i);
      gb += grad_y[i];
    }
    const auto check = [&](const char* what, double got, double expected, double bound) {
      CHECK(std::abs(got - expected) <= bound * size, what, name(exec.isa), exec.parallel.threads(),
          pixels, channels, offset, c, got, expected);
    };
    check("mean", mean[c], m, 1e-6);
    check("var", var[c], v, 1e-6);
    // The roundings of GELU and mean count times `inverse`.
    check("grad weight", grad_weight[c], gw, 3e-7 * (1 + inverse) * pixels);
    check("grad bias", grad_bias[c], gb, 1e-6 * pixels);
    for (int64_t i = c; i < pixels * channels; i += channels) {
      const double scale = 1 + std::abs(weight[c]) * inverse;
      check("y", y[i], weight[c] * normalised(i) + bias[c] + residual[i], 4e-6 * scale);
      const double grad = weight[c] * inverse *
                          (grad_y[i] - gb / pixels - normalised(i) * gw / pixels) *
                          gelu_slope(x[i]);
      check("grad x", grad_x[i], grad, 1e-5 * scale);
    }
  }
}

} // namespace

int main() {
  for_each_exec([](const Exec& exec) {
    test_gelu(exec);
    Random random;
    for (const int64_t channels : {1, 3, 4, 15, 16, 17, 64, 65})
      for (const int64_t pixels : {2, 7, 64, 65, 300})
        test_norm(exec, pixels, channels, 0.0f, random);
    test_norm(exec, 300, 5, 30.0f, random); // a mean far larger than the deviation
    test_norm(exec, 5000, 40, 0.5f, random);
  });
}
