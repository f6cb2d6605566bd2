// Convolutions in turn, image by image: what one makes lies in the L2 cache when the next reads it,
// and a thread that has images of its own never waits for another.
#include "buffer.h"

#include "masked_kernels/kernels.h"

#include <atomic>

namespace masked_kernels {
namespace {

void run(const DepthwiseConv2d& conv, const Exec& exec) {
  depthwise_conv2d(conv, exec);
}

void run(const AlignedLinear& conv, const Exec& exec) {
  aligned_linear(conv, exec);
}

void run(const PanelLinear& conv, const Exec& exec) {
  panel_linear(conv, exec);
}

bool can_be_in_place(const PanelLinear&, const Exec&) {
  return false;
}

// The chain with memory for what its steps but the last make of an image: one place where they can
// work in place, else two to go to and fro between.
class Worker {
 public:
  Worker(const MaskedConv2dChain& chain, const Exec& exec)
      : chain_(chain), exec_(exec), places_(chain.steps.size()) {
    int64_t largest = 0;
    for (size_t i = 0; i + 1 < chain.steps.size(); ++i) {
      const bool stays =
          i == 0 || std::visit([&](const auto& conv) { return can_be_in_place(conv, exec); },
                        chain.steps[i].conv);
      const int before = i == 0 ? 0 : places_[i - 1];
      places_[i] = stays ? before : 1 - before;
      largest = std::max(largest, chain.steps[i].outputs);
    }
    for (const int place : places_)
      if (memory_[place].data() == nullptr)
        memory_[place] = Buffer(largest);
  }

  void operator()(int64_t image) const {
    const float* x = chain_.x + image * chain_.inputs;
    for (size_t i = 0; i < chain_.steps.size(); ++i) {
      const MaskedConv2dChain::Step& step = chain_.steps[i];
      const bool is_last = i + 1 == chain_.steps.size();
      float* const y = is_last ? chain_.y + image * step.outputs : memory_[places_[i]].data();
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
  std::vector<int> places_; // of what each step makes, in memory_
  Buffer memory_[2];
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
