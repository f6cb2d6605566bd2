// Convolutions in turn, image by image: what one makes lies in the L2 cache when the next reads it,
// and a thread that has images of its own never waits for another.
#include "buffer.h"
#include "planes.h"

#include "masked_kernels/kernels.h"

#include <atomic>
#include <optional>

namespace masked_kernels {
namespace {

using Step = MaskedConv2dChain::Step;

// Steps that follow one another.
struct Steps {
  const Step *begin_, *end_;

  const Step* begin() const { return begin_; }
  const Step* end() const { return end_; }
  size_t size() const { return end_ - begin_; }
  const Step& operator[](size_t i) const { return begin_[i]; }
};

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

// The step, of x, to y.
template <class Conv>
Conv placed(Conv conv, bool adds_input, const float* x, float* y) {
  conv.x = x;
  conv.y = y;
  conv.epilogue.residual = adds_input ? x : nullptr;
  return conv;
}

// Steps of an image with memory for what all but the last make: one place where they can work in
// place, else two to go to and fro between.
class Worker {
 public:
  Worker(const Steps& steps, const Exec& exec) : steps_(steps), exec_(exec), places_(steps.size()) {
    int64_t largest = 0;
    for (size_t i = 0; i + 1 < steps.size(); ++i) {
      const bool stays =
          i == 0 ||
          std::visit([&](const auto& conv) { return can_be_in_place(conv, exec); }, steps[i].conv);
      const int before = i == 0 ? 0 : places_[i - 1];
      places_[i] = stays ? before : 1 - before;
      largest = std::max(largest, steps[i].outputs);
    }
    for (const int place : places_)
      if (memory_[place].data() == nullptr)
        memory_[place] = Buffer(largest);
  }

  void operator()(const float* x, float* y) const {
    for (size_t i = 0; i < steps_.size(); ++i) {
      float* const to = i + 1 == steps_.size() ? y : memory_[places_[i]].data();
      std::visit([&](const auto& conv) { run(placed(conv, steps_[i].adds_input, x, to), exec_); },
          steps_[i].conv);
      x = to;
    }
  }

 private:
  const Steps steps_;
  const Exec& exec_;
  std::vector<int> places_; // of what each step makes, in memory_
  Buffer memory_[2];
};

#if MK_X86
void run_in(const Planes& planes, const DepthwiseConv2d& conv, const Exec& exec) {
  depthwise_planes(planes, conv, exec);
}

void run_in(const Planes& planes, const AlignedLinear& conv, const Exec& exec) {
  aligned_planes(planes, conv, exec);
}

void run_in(const Planes&, const PanelLinear&, const Exec&) {} // has no planes

bool has_planes(const PanelLinear&) {
  return false;
}

// Steps that have planes, the first ones perhaps before them.
class PlanesWorker {
 public:
  // Where the last steps have them, all of one size, and are enough to pay for the way there and
  // back.
  struct Plan {
    Planes planes;
    Steps before, steps;

    static std::optional<Plan> of(const Steps& all, Isa isa) {
      std::optional<Planes> planes;
      const Step* first = all.end();
      const auto has = [](const Step& step) {
        return std::visit([](const auto& conv) { return has_planes(conv); }, step.conv);
      };
      for (; isa != Isa::scalar && first != all.begin() && has(first[-1]); --first)
        if (const auto* conv = std::get_if<DepthwiseConv2d>(&first[-1].conv))
          planes = Planes{conv->channels, conv->height, conv->width};
      if (all.end() - first < 2 || !planes || !planes->are_whole_vectors())
        return std::nullopt;
      return Plan{*planes, {all.begin(), first}, {first, all.end()}};
    }
  };

  PlanesWorker(const Plan& plan, const Exec& exec)
      : plan_(plan), exec_(exec), before_(plan.before, exec),
        memory_(Planes::kVector + plan.planes.channels * plan.planes.stride()) {
    if (plan.before.size() > 0)
      pixels_ = Buffer(plan.planes.channels * plan.planes.pixels());
  }

  void operator()(const float* x, float* y) const {
    if (plan_.before.size() > 0) {
      before_(x, pixels_.data());
      x = pixels_.data();
    }
    float* const at = memory_.data() + Planes::kVector;
    to_planes(plan_.planes, x, at, exec_);
    for (const Step& step : plan_.steps)
      std::visit(
          [&](const auto& conv) {
            run_in(plan_.planes, placed(conv, step.adds_input, at, at), exec_);
          },
          step.conv);
    from_planes(plan_.planes, at, y, exec_);
  }

 private:
  const Plan& plan_;
  const Exec& exec_;
  Worker before_;
  Buffer pixels_, memory_;
};
#endif

// Each image by one thread, or by all threads where fewer images than they are left.
template <class WorkerFor>
void each_image(const MaskedConv2dChain& p, const Exec& exec, const WorkerFor& worker_for) {
  const int64_t threads = exec.parallel.threads(), outputs = p.steps.back().outputs;
  const int64_t alone = p.images / threads * threads; // images that one thread does
  std::atomic<int64_t> next{0};
  exec.parallel.run(0, std::min(alone, threads), 1, [&](int64_t, int64_t) {
    const Serial serial;
    const Exec own{exec.isa, serial};
    const auto worker = worker_for(own);
    for (int64_t image; (image = next++) < alone;)
      worker(p.x + image * p.inputs, p.y + image * outputs);
  });
  if (alone < p.images) {
    const auto worker = worker_for(exec);
    for (int64_t image = alone; image < p.images; ++image)
      worker(p.x + image * p.inputs, p.y + image * outputs);
  }
}

// All images at once.
void run_batch(DepthwiseConv2d conv, int64_t images, const Exec& exec) {
  conv.batch *= images;
  run(conv, exec);
}

template <class Linear>
void run_batch(Linear conv, int64_t images, const Exec& exec) {
  conv.tokens *= images;
  run(conv, exec);
}

} // namespace

void masked_conv2d_chain(const MaskedConv2dChain& p, const Exec& exec) {
  const Steps steps{p.steps.data(), p.steps.data() + p.steps.size()};
  if (steps.size() == 1) {
    std::visit(
        [&](const auto& conv) {
          run_batch(placed(conv, steps[0].adds_input, p.x, p.y), p.images, exec);
        },
        steps[0].conv);
    return;
  }
#if MK_X86
  if (const auto plan = PlanesWorker::Plan::of(steps, exec.isa)) {
    each_image(p, exec, [&](const Exec& own) { return PlanesWorker(*plan, own); });
    return;
  }
#endif
  each_image(p, exec, [&](const Exec& own) { return Worker(steps, own); });
}

} // namespace masked_kernels
