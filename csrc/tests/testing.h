// What the tests share: CHECK, threads, the instruction sets of this machine, random masks.
#pragma once

#include "masked_kernels/kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#define CHECK(holds, ...)                                                                          \
  do {                                                                                             \
    if (!(holds))                                                                                  \
      testing::fail(__FILE__, __LINE__, #holds, __VA_ARGS__);                                      \
  } while (false)

namespace testing {

using namespace masked_kernels;

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const char* what, const Parts&... parts) {
  std::ostringstream context;
  ((context << parts << ' '), ...);
  std::fprintf(stderr, "%s:%d: %s is false: %s\n", file, line, what, context.str().c_str());
  std::exit(1);
}

class Threads final : public Parallel {
 public:
  explicit Threads(int64_t count) : count_(count) {}

  int64_t threads() const override { return count_; }

  void run(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) const override {
    const int64_t parts = std::min(count_, ceil_div(end - begin, std::max<int64_t>(grain, 1)));
    if (parts <= 1) {
      Serial().run(begin, end, grain, fn);
      return;
    }
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < parts; ++i)
      threads.emplace_back([&, i] {
        fn(begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts);
      });
    for (std::thread& thread : threads)
      thread.join();
  }

 private:
  int64_t count_;
};

// Calls fn(exec) for every instruction set of this machine, with one thread and with three.
template <class Fn>
void for_each_exec(const Fn& fn) {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (isa > best_isa())
      continue;
    for (const int64_t threads : {1, 3})
      fn(Exec{isa, Threads(threads)});
  }
}

// Word edges, and rows of several words.
constexpr int64_t kCols[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 600};

struct Random {
  std::mt19937 engine{7};

  uint32_t bits() { return engine(); }
  float normal() { return std::normal_distribution<float>()(engine); }

  // About one in `drop` bits is 0; padding is 0. Exactly as long as it must be, so that a sanitizer
  // sees every read past the end.
  std::vector<uint32_t> words(Shape shape, uint32_t drop = 2) {
    std::vector<uint32_t> words(shape.words());
    for (int64_t row = 0; row < shape.rows; ++row)
      for (int64_t col = 0; col < shape.cols; ++col)
        if (bits() % drop != 0)
          words[row * words_per_row(shape.cols) + col / 32] |= 1u << col % 32;
    return words;
  }

  std::vector<float> floats(int64_t count) {
    std::vector<float> floats(count);
    for (float& x : floats)
      x = normal();
    return floats;
  }
};

inline bool bit(const std::vector<uint32_t>& words, Shape shape, int64_t row, int64_t col) {
  return words[row * words_per_row(shape.cols) + col / 32] >> col % 32 & 1;
}

} // namespace testing
