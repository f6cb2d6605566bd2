#pragma once

#include <cstdint>
#include <functional>

namespace masked_kernels {

using RangeFn = std::function<void(int64_t begin, int64_t end)>;

// Threads come from the caller, so that kernels obey the thread settings of the program they run
// in.
class Parallel {
 public:
  virtual ~Parallel() = default;

  virtual int64_t threads() const = 0;

  // Cuts [begin, end) into disjoint ranges, of at least `grain` where possible, and calls fn on
  // each, perhaps at the same time. Returns when all calls have.
  virtual void run(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) const = 0;
};

class Serial final : public Parallel {
 public:
  int64_t threads() const override { return 1; }

  void run(int64_t begin, int64_t end, int64_t, const RangeFn& fn) const override {
    if (begin < end)
      fn(begin, end);
  }
};

} // namespace masked_kernels
