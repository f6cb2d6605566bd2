// BatchNorm and ReLU in one, against loops in double.
#include "testing.h"

#include <cmath>

using namespace testing;

namespace {

struct Sizes {
  int64_t pixels, channels;
  float offset;
};

void test_norm(const Exec& exec, const Sizes& sizes, bool is_of_norm, bool of_batch) {
  const auto [pixels, channels, offset] = sizes;
  Random random;
  std::vector<float> x = random.floats(pixels * channels);
  for (float& value : x)
    value += offset;
  const std::vector<float> grad_y = random.floats(pixels * channels);
  const std::vector<float> residual = random.floats(pixels * channels);
  const std::vector<float> weight = random.floats(channels), bias = random.floats(channels);
  std::vector<float> mean(channels, NAN), var(channels, NAN), y(x.size(), NAN), sum(x.size(), NAN);
  std::vector<float> grad_weight(channels, NAN), grad_bias(channels, NAN), grad_x(x.size(), NAN);
  const float eps = 1e-3f;

  batch_norm_stats(x.data(), pixels, channels, mean.data(), var.data(), exec);
  const BatchNorm p{
      x.data(), pixels, channels, mean.data(), var.data(), weight.data(), bias.data(), eps};
  batch_norm_relu(p, nullptr, y.data(), exec);
  batch_norm_relu(p, residual.data(), sum.data(), exec);
  batch_norm_relu_grads(p, grad_y.data(), is_of_norm, of_batch, grad_x.data(), grad_weight.data(),
      grad_bias.data(), exec);

  for (int64_t c = 0; c < channels; ++c) {
    double m = 0, v = 0, gw = 0, gb = 0;
    for (int64_t i = c; i < pixels * channels; i += channels)
      m += double{x[i]} / pixels;
    for (int64_t i = c; i < pixels * channels; i += channels)
      v += (x[i] - m) * (x[i] - m) / pixels;
    const double inverse = 1 / std::sqrt(v + eps), size = 1 + std::abs(offset);
    const auto normalised = [&](int64_t i) { return (x[i] - m) * inverse; };
    const auto before_relu = [&](int64_t i) { return weight[c] * normalised(i) + bias[c]; };
    const auto grad = [&](int64_t i) { return is_of_norm || y[i] > 0 ? grad_y[i] : 0.0f; };
    for (int64_t i = c; i < pixels * channels; i += channels) {
      gw += grad(i) * normalised(i);
      gb += grad(i);
    }
    const auto check = [&](const char* what, double got, double expected, double bound) {
      CHECK(std::abs(got - expected) <= bound * size, what, name(exec.isa), exec.parallel.threads(),
          pixels, channels, offset, is_of_norm, of_batch, c, got, expected);
    };
    check("mean", mean[c], m, 1e-6);
    check("var", var[c], v, 1e-6);
    check("grad weight", grad_weight[c], gw, 3e-7 * (1 + inverse) * pixels);
    check("grad bias", grad_bias[c], gb, 1e-6 * pixels);
    for (int64_t i = c; i < pixels * channels; i += channels) {
      const double scale = 1 + std::abs(weight[c]) * inverse;
      check("y", y[i], std::max(before_relu(i), 0.0), 4e-6 * scale);
      check("sum", sum[i], std::max(before_relu(i) + residual[i], 0.0), 4e-6 * scale);
      const double moved = of_batch ? gb / pixels + normalised(i) * gw / pixels : 0;
      check("grad x", grad_x[i], weight[c] * inverse * (grad(i) - moved), 1e-5 * scale);
    }
  }
}

// NaN is no positive number, yet it and its gradient pass; infinity stays.
void test_not_finite(const Exec& exec) {
  const std::vector<float> x{NAN, INFINITY, -INFINITY}, ones(3, 1.0f), zeros(3, 0.0f);
  std::vector<float> y(3), grad_x(3), grad_weight(3), grad_bias(3);
  const BatchNorm p{x.data(), 1, 3, zeros.data(), ones.data(), nullptr, nullptr, 0.0f};
  batch_norm_relu(p, nullptr, y.data(), exec);
  CHECK(std::isnan(y[0]) && y[1] == INFINITY && y[2] == 0, name(exec.isa), y[0], y[1], y[2]);
  batch_norm_relu_grads(
      p, ones.data(), false, false, grad_x.data(), grad_weight.data(), grad_bias.data(), exec);
  CHECK(grad_bias[0] == 1 && grad_bias[1] == 1 && grad_bias[2] == 0, name(exec.isa), grad_bias[0],
      grad_bias[1], grad_bias[2]);
}

} // namespace

int main() {
  for_each_exec([](const Exec& exec) {
    test_not_finite(exec);
    for (const bool is_of_norm : {false, true})
      for (const bool of_batch : {false, true}) {
        for (const int64_t channels : {1, 3, 4, 15, 16, 17, 64, 65})
          for (const int64_t pixels : {2, 7, 16, 17, 300})
            test_norm(exec, {pixels, channels, 0.0f}, is_of_norm, of_batch);
        test_norm(exec, {300, 5, 30.0f}, is_of_norm, of_batch); // a mean larger than the deviation
        test_norm(exec, {5000, 40, 0.5f}, is_of_norm, of_batch);
      }
  });
}
