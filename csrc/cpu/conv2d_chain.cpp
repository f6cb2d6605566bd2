// Convolutions in turn, image by image: what one makes lies in the L2 cache when the next reads it,
// and a thread that has images of its own never waits for another.
#include "masked_kernels/kernels.h"

#include <atomic>
#include <memory>

namespace masked_kernels {
namespace {

void run(const DepthwiseConv2d& conv, const Exec& exec) {
  depthwise_conv2d(conv, exec);
}

void run(const AlignedLinear& conv, const Exec& exec) {
  aligned_linear(conv, exec);
}

// The chain with memory for what its steps make of an image on the way to y. They work in place
// where they can, else they go to and fro between y and a place beside it.
class Worker {
 public:
  Worker(const MaskedConv2dChain& chain, const Exec& exec)
      : chain_(chain), exec_(exec), beside_(chain.steps.size()) {
    const auto& steps = chain.steps;
    for (size_t i = steps.size() - 1; i > 0; --i) {
      const bool stays =
          std::visit([&](const auto& conv) { return can_be_in_place(conv, exec); }, steps[i].conv);
      beside_[i - 1] = stays ? beside_[i] : !beside_[i];
      largest_ = std::max(largest_, steps[i - 1].outputs);
    }
    fits_y_ = largest_ <= steps.back().outputs;
    memory_.reset(new float[fits_y_ ? largest_ : 2 * largest_]);
  }

  void operator()(int64_t image) const {
    const float* x = chain_.x + image * chain_.inputs;
    float* const image_y = chain_.y + image * chain_.steps.back().outputs;
    for (size_t i = 0; i < chain_.steps.size(); ++i) {
      const MaskedConv2dChain::Step& step = chain_.steps[i];
      const bool is_last = i + 1 == chain_.steps.size();
      float* const y = beside_[i]           ? memory_.get()
                       : fits_y_ || is_last ? image_y
                                            : memory_.get() + largest_;
      std::visit(
          [&](auto conv) {
            conv.x = x;
            conv.y = y;
            conv.epilogue.residual = step.adds_input ? x : nullptr;
            run(conv, exec_);
          },
          step.conv);
      x = y;
    }
  }

 private:
  const MaskedConv2dChain& chain_;
  const Exec& exec_;
  std::vector<bool> beside_; // whether a step's outputs lie beside y
  int64_t largest_ = 0;      // outputs of a step before the last
  bool fits_y_;              // whether y has room for them
  std::unique_ptr<float[]> memory_;
};

} // namespace

void masked_conv2d_chain(const MaskedConv2dChain& p, const Exec& exec) {
  const int64_t threads = exec.parallel.threads();
  const int64_t alone = p.images / threads * threads; // images that one thread does
  std::atomic<int64_t> next{0};
  exec.parallel.run(0, std::min(alone, threads), 1, [&](int64_t, int64_t) {
    const Serial serial;
    const Exec own{exec.isa, serial};
    const Worker worker(p, own);
    for (int64_t image; (image = next++) < alone;)
      worker(image);
  });
  if (alone < p.images) {
    const Worker worker(p, exec);
    for (int64_t image = alone; image < p.images; ++image)
      worker(image);
  }
}

} // namespace masked_kernels
