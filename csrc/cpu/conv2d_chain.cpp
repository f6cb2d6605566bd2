// Convolutions in turn, image by image: what one makes lies in the L2 cache when the next reads it,
// and a thread that has images of its own never waits for another.
#include "buffer.h"
#include "planes.h"

#include "masked_kernels/kernels.h"

#include <atomic>
#include <optional>

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

// All images: each by one thread, or by all threads where fewer than they are left.
template <class WorkerFor>
void each_image(const MaskedConv2dChain& p, const Exec& exec, const WorkerFor& worker_for) {
  const int64_t threads = exec.parallel.threads();
  const int64_t alone = p.images / threads * threads; // images that one thread does
  std::atomic<int64_t> next{0};
  exec.parallel.run(0, std::min(alone, threads), 1, [&](int64_t, int64_t) {
    const Serial serial;
    const Exec own{exec.isa, serial};
    const auto worker = worker_for(own);
    for (int64_t image; (image = next++) < alone;)
      worker(image);
  });
  if (alone < p.images) {
    const auto worker = worker_for(exec);
    for (int64_t image = alone; image < p.images; ++image)
      worker(image);
  }
}

#if MK_X86
// The decoded weight of each depthwise step; none of the others.
std::vector<Buffer> filters_of(const MaskedConv2dChain& chain, const Exec& exec) {
  std::vector<Buffer> filters(chain.steps.size());
  exec.parallel.run(0, chain.steps.size(), 1, [&](int64_t begin, int64_t end) {
    const Serial serial;
    for (int64_t i = begin; i < end; ++i)
      if (const auto* conv = std::get_if<DepthwiseConv2d>(&chain.steps[i].conv)) {
        const int64_t taps = conv->kernel_h * conv->kernel_w;
        filters[i] = Buffer(conv->channels * taps);
        decode({conv->values, conv->period, sizeof(float), conv->words, taps, 0, conv->channels,
                   filters[i].data()},
            {exec.isa, serial});
      }
  });
  return filters;
}

// The chain in planes, where all steps have them and keep the image's size: in one place.
class PlanesWorker {
 public:
  PlanesWorker(const MaskedConv2dChain& chain, const Planes& planes,
      const std::vector<Buffer>& filters, const Exec& exec)
      : chain_(chain), planes_(planes), filters_(filters), exec_(exec),
        memory_(planes.channels * planes.stride()) {}

  void operator()(int64_t image) const {
    to_planes(planes_, chain_.x + image * chain_.inputs, memory_.data(), exec_);
    for (size_t i = 0; i < chain_.steps.size(); ++i)
      std::visit(
          [&](auto conv) {
            conv.x = conv.y = memory_.data();
            conv.epilogue.residual = chain_.steps[i].adds_input ? conv.x : nullptr;
            run(conv, filters_[i].data());
          },
          chain_.steps[i].conv);
    from_planes(planes_, memory_.data(), chain_.y + image * chain_.inputs, exec_);
  }

  // Of an image, if the chain can be run so.
  static std::optional<Planes> planes_of(const MaskedConv2dChain& chain, Isa isa) {
    std::optional<Planes> planes;
    bool all = isa != Isa::scalar;
    for (const MaskedConv2dChain::Step& step : chain.steps)
      if (const auto* conv = std::get_if<DepthwiseConv2d>(&step.conv)) {
        planes = Planes{conv->channels, conv->height, conv->width};
        all = all && has_planes(*conv);
      } else if (const auto* linear = std::get_if<AlignedLinear>(&step.conv)) {
        all = all && has_planes(*linear);
      } else {
        all = false;
      }
    return all && planes && planes->are_whole_vectors() ? planes : std::nullopt;
  }

 private:
  void run(const DepthwiseConv2d& conv, const float* filters) const {
    depthwise_planes(planes_, conv, filters, exec_);
  }

  void run(const AlignedLinear& conv, const float*) const { aligned_planes(planes_, conv, exec_); }

  void run(const PanelLinear&, const float*) const {} // has no planes

  const MaskedConv2dChain& chain_;
  const Planes planes_;
  const std::vector<Buffer>& filters_;
  const Exec& exec_;
  Buffer memory_;
};
#endif

} // namespace

void masked_conv2d_chain(const MaskedConv2dChain& p, const Exec& exec) {
#if MK_X86
  if (const auto planes = PlanesWorker::planes_of(p, exec.isa)) {
    const std::vector<Buffer> filters = filters_of(p, exec);
    each_image(p, exec, [&](const Exec& own) { return PlanesWorker(p, *planes, filters, own); });
    return;
  }
#endif
  each_image(p, exec, [&](const Exec& own) { return Worker(p, own); });
}

} // namespace masked_kernels
