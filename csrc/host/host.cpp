// masked_kernels._host: the torch-free helpers that tools and the file format use, over NumPy
// arrays.
#include "masked_kernels/bits.h"
#include "masked_kernels/isa.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <string_view>

namespace py = pybind11;
using namespace masked_kernels;

namespace {

using Words = py::array_t<uint32_t, py::array::c_style>;

Shape shape_of(const Words& words, int64_t cols) {
  if (words.ndim() != 2)
    throw py::value_error("words: " + std::to_string(words.ndim()) + " dimensions, expected 2");
  if (cols < 0 || words.shape(1) != words_per_row(cols))
    throw py::value_error("words: " + std::to_string(words.shape(1)) +
                          " words per row, expected ceil(" + std::to_string(cols) +
                          "/32) = " + std::to_string(words_per_row(cols)));
  return {words.shape(0), cols};
}

// Rows follow one another without padding: row r begins at bit r * cols, in the middle of a byte
// more often than not. Bits travel through a 64-bit window, a word at a time.
py::bytes pack_bytes(const Words& words, int64_t cols) {
  const Shape shape = shape_of(words, cols);
  std::string bytes(ceil_div(shape.elements(), 8), '\0');
  const uint32_t* word = words.data();
  size_t at = 0;
  uint64_t window = 0;
  int held = 0;
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t left = cols; left > 0; left -= kWordBits) {
      window |= uint64_t{*word++ & low_bits(left)} << held;
      held += static_cast<int>(std::min(left, kWordBits));
      for (; held >= 8; held -= 8, window >>= 8)
        bytes[at++] = static_cast<char>(window);
    }
  }
  if (held > 0)
    bytes[at] = static_cast<char>(window);
  return py::bytes(bytes);
}

Words unpack_bytes(const py::bytes& data, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0)
    throw py::value_error("rows, cols: got " + std::to_string(rows) + ", " + std::to_string(cols) +
                          ", expected >= 0");
  const std::string_view bytes = data;
  const Shape shape{rows, cols};
  const int64_t expected = ceil_div(shape.elements(), 8);
  if (static_cast<int64_t>(bytes.size()) != expected)
    throw py::value_error("data: " + std::to_string(bytes.size()) + " bytes, expected ceil(" +
                          std::to_string(rows) + "*" + std::to_string(cols) +
                          "/8) = " + std::to_string(expected));
  Words words({rows, words_per_row(cols)});
  uint32_t* word = words.mutable_data();
  size_t at = 0;
  uint64_t window = 0;
  int held = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t left = cols; left > 0; left -= kWordBits) {
      const int taken = static_cast<int>(std::min(left, kWordBits));
      for (; held < taken; held += 8)
        window |= uint64_t{static_cast<uint8_t>(bytes[at++])} << held;
      *word++ = static_cast<uint32_t>(window) & low_bits(taken);
      window >>= taken;
      held -= taken;
    }
  }
  return words;
}

int64_t popcount(const Words& words) {
  int64_t sum = 0;
  for (const uint32_t *word = words.data(), *end = word + words.size(); word != end; ++word)
    sum += __builtin_popcount(*word);
  return sum;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["bmi2"] = __builtin_cpu_supports("bmi2") != 0;
  features["popcnt"] = __builtin_cpu_supports("popcnt") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  features["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  features["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
#endif
  return features;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = MASKED_KERNELS_TORCH_VERSION;
  info["flags"] = MASKED_KERNELS_FLAGS;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

} // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Torch-free helpers over NumPy arrays: packed bits to and from bytes, CPU features.";
  m.def("pack_bytes", &pack_bytes, py::arg("words"), py::arg("cols"),
      "Bits of words (uint32 [rows, ceil(cols/32)]) as ceil(rows*cols/8) bytes, least significant "
      "first, no row padding.");
  m.def("unpack_bytes", &unpack_bytes, py::arg("data"), py::arg("rows"), py::arg("cols"),
      "The words (uint32 [rows, ceil(cols/32)]) that pack_bytes turned into data.");
  m.def("popcount", &popcount, py::arg("words"), "Number of set bits in all words.");
  m.def("cpu_features", &cpu_features,
      "Instruction sets the kernels ask about, and whether this CPU has them.");
  m.def(
      "isa", [] { return name(active_isa()); },
      "The instruction set the kernels use now: \"avx512\", \"avx2\" or \"scalar\". "
      "MASKED_KERNELS_CPU_ISA forces one; ValueError if it is unknown or missing here.");
  m.def("build_info", &build_info, "What this build was made with: torch, compiler, flags.");
}
