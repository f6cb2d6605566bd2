// y [M, N] = scale * x [M, K] (w . m)^T + bias for a prototype aligned with the rows: every row
// reads one of few value vectors v_0 .. v_{c-1}, row o reading v_{o % c}.
//
// Then the weight need not be multiplied at all: scale x by v_p, and each product is a sum of those
// x whose bit is set. Five columns have 32 such sums, and as soon as more rows than that share them
// it pays to make a table of the sums and look five columns up at once (aligned_tables.h has the
// two ways to). The sums are those of float32, nothing is rounded that a dot product would not
// round.
#include "aligned_tables.h"
#include "buffer.h"
#include "epilogue.h"

#include "masked_kernels/kernels.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace masked_kernels {
namespace {

// The outputs of `rows` (at most 16) adjacent rows for some tokens.
struct Block {
  const AlignedLinear& params;
  int64_t token, tokens, row, rows;
  const float* sums; // [tokens, 16]
  const float* bias; // [16]

  // The first to y, with `stride` floats from token to token, as they leave the layer.
  template <int kLanes>
  MK_INLINE void store_to(float* y, int64_t stride) const {
    for (int64_t i = 0; i < rows; i += kLanes) {
      const Outputs<kLanes> outputs{sums + i, kBlockRows, tokens, rows - i, y + i, stride};
      if (params.epilogue)
        outputs.finish(params.epilogue, row + i, token * params.rows + row + i, params.rows);
      else
        outputs.shift(params.scale, load<kLanes>(bias + i));
    }
  }
};
using Store = void (*)(const Block& block, float* y, int64_t stride);

namespace scalar {
void store(const Block& block, float* y, int64_t stride) {
  block.store_to<4>(y, stride);
}
} // namespace scalar

#if MK_X86
namespace avx2 {
MK_AVX2 void store(const Block& block, float* y, int64_t stride) {
  block.store_to<8>(y, stride);
}
} // namespace avx2

namespace avx512 {
MK_AVX512 void store(const Block& block, float* y, int64_t stride) {
  block.store_to<16>(y, stride);
}
} // namespace avx512
#endif

struct Kernels {
  Store store;
  const Passes& passes;

  explicit Kernels(Isa isa) : store(MK_BY_ISA(isa, store)), passes(MK_BY_ISA(isa, kPasses)) {}
};

struct alignas(64) Vector {
  float lane[kBlockRows];
};

// Some blocks of rows that read the same values, with their biases [blocks, 16].
struct Tile {
  const float* values; // [cols]
  const uint32_t* words;
  int64_t first_row, count;
  std::vector<Vector> bias;

  Tile(const AlignedLinear& p, const AlignedRows& rows, const float* row_values, int64_t pattern,
      int64_t begin, int64_t end)
      : values(row_values),
        words(p.tiles + (rows.first_block(pattern) + begin) * tile_words(p.cols) * kBlockRows),
        first_row(rows.row(pattern, begin * kBlockRows)),
        count(std::min((end - begin) * kBlockRows, rows.in_pattern(pattern) - begin * kBlockRows)),
        bias(end - begin) {
    for (int64_t i = 0; p.bias && i < count; ++i)
      bias[i / kBlockRows].lane[i % kBlockRows] = p.bias[first_row + i * p.patterns];
  }

  int64_t blocks() const { return static_cast<int64_t>(bias.size()); }
};

struct Workspace {
  Buffer tables, patches;
  std::unique_ptr<Vector[]> sums; // not initialised
  int64_t patch_stride;           // no power of two: patches do not fight over the same cache sets

  Workspace(const AlignedLinear& p, const Passes& passes, int64_t blocks)
      : tables(passes.most_words() * kTableFloats), sums(new Vector[blocks * passes.most]),
        patch_stride((ceil_div(p.cols, kBlockRows) | 1) * kBlockRows) {
    if (p.patches)
      patches = Buffer(passes.most * patch_stride);
  }
};

// Tokens of a pass.
struct Tokens {
  int64_t first, count;
  const float* x; // [count, stride]
  int64_t stride;
  Ahead next; // the x of the next pass

  Tokens(const AlignedLinear& p, int64_t begin, int64_t most, Workspace& space)
      : first(begin), count(std::min(most, p.tokens - begin)), x(p.x + begin * p.cols),
        stride(p.cols) {
    if (p.patches) {
      x = space.patches.data();
      stride = space.patch_stride;
      p.patches.copy(
          p.x, {first, first + count}, {0, p.patches.channels}, space.patches.data(), stride);
    } else {
      const int64_t end = first + count;
      next = {p.x + end * p.cols, p.x + std::min(end + count, p.tokens) * p.cols};
    }
  }
};

// y of a tile's rows for some tokens, from the pass's sums
void store(const AlignedLinear& p, const Tile& tile, const Kernels& kernels, const Pass& pass,
    const Tokens& tokens, const Vector* sums) {
  Vector by_token[kMostTokens];
  for (int64_t block = 0; block < tile.blocks(); ++block, sums += pass.tokens) {
    if (pass.by_token)
      pass.by_token(sums->lane, by_token->lane);
    const int64_t first = block * kBlockRows, count = std::min(kBlockRows, tile.count - first);
    const int64_t row = tile.first_row + first * p.patterns;
    const Block results{p, tokens.first, tokens.count, row, count,
        (pass.by_token ? by_token : sums)->lane, tile.bias[block].lane};
    float* out = p.y + tokens.first * p.rows + row;
    if (p.patterns == 1) {
      kernels.store(results, out, p.rows);
      continue;
    }
    Vector y[kMostTokens];
    kernels.store(results, y->lane, kBlockRows);
    for (int64_t t = 0; t < tokens.count; ++t, out += p.rows)
      for (int64_t i = 0; i < count; ++i)
        out[i * p.patterns] = y[t].lane[i];
  }
}

void multiply_tile(const AlignedLinear& p, const Tile& tile, const Kernels& kernels,
    const Pass& pass, const Tokens& tokens, Workspace& space) {
  float* tables = space.tables.data();
  const int64_t words = tile_words(p.cols);
  if (words == 0)
    std::fill_n(space.sums.get(), tile.blocks() * pass.tokens, Vector{});
  const float* y = p.y + tokens.first * p.rows;
  Ahead y_ahead{y, y + tokens.count * p.rows}, x_ahead = tokens.next;
  const int64_t calls = std::max<int64_t>(ceil_div(words, pass.words), 1) *
                        (tile.blocks() / pass.blocks + tile.blocks() % pass.blocks);
  const int64_t y_lines = ceil_div(y_ahead.lines(), calls),
                x_lines = ceil_div(x_ahead.lines(), calls);
  for (int64_t word = 0; word < words; word += pass.words) {
    const int64_t col = word * kTileColumns;
    const int64_t columns = std::min(pass.words * kTileColumns, p.cols - col);
    pass.build_tables({tokens.x + col, tokens.stride, tokens.count, columns, tile.values + col},
        tile_words(columns) * kTileColumns, tables);
    for (int64_t block = 0; block < tile.blocks();) {
      const bool full = block + pass.blocks <= tile.blocks();
      const int64_t count_of = full ? pass.blocks : 1;
      Vector* sums = &space.sums[block * pass.tokens];
      (full ? pass.kernel : pass.single)(tile.words + (block * words + word) * kBlockRows,
          words * kBlockRows, columns, tables, word == 0, sums->lane, y_ahead.take(y_lines),
          x_ahead.take(x_lines));
      block += count_of;
    }
  }
  store(p, tile, kernels, pass, tokens, space.sums.get());
}

// Whether threads share the tokens, else they share the rows.
bool share_tokens(const AlignedLinear& p, const Passes& passes, const Exec& exec) {
  return p.tokens >= 2 * passes.most * exec.parallel.threads();
}

// turned = the bits [cols / taps, taps] of a row as [taps, cols / taps]
void turn_row(const uint32_t* row, int64_t cols, int64_t taps, uint32_t* turned) {
  int64_t from = 0;
  for (int64_t to = 0; to < cols; ++turned) {
    uint32_t word = 0;
    for (int64_t j = 0; j < kWordBits && to < cols; ++j, ++to) {
      word |= (row[from / kWordBits] >> from % kWordBits & 1) << j;
      from += taps;
      from -= from >= cols ? cols - 1 : 0; // the next tap of the first channel
    }
    *turned = word;
  }
}

} // namespace

void Patches::copy(const float* images, const Interval& tokens, const Interval& of, float* to,
    int64_t stride) const {
  const int64_t copied = of.size();
  // Adjacent taps of all channels lie next to one another.
  const int64_t run = dilation_w == 1 && copied == channels ? kernel_w : 1, runs = kernel_w / run;
  for (int64_t token = tokens.begin; token < tokens.end; ++token, to += stride) {
    const int64_t out_row = token / out_width, image = out_row / out_height;
    const int64_t top = out_row % out_height * stride_h - pad_h;
    const int64_t left = token % out_width * stride_w - pad_w;
    float* out = to;
    for (int64_t i = 0; i < kernel_h; ++i)
      for (int64_t j = 0; j < runs; ++j) {
        const int64_t row = top + i * dilation_h, column = left + j * dilation_w;
        // The taps of a run from `begin` to `end` are inside the image.
        const bool inside = 0 <= row && row < height;
        const int64_t begin = inside ? std::clamp<int64_t>(-column, 0, run) : run;
        const int64_t end = inside ? std::clamp(width - column, begin, run) : run;
        const int64_t pixel = (image * height + row) * width + column + begin;
        out = std::fill_n(out, begin * copied, 0.0f);
        if (begin < end)
          out = std::copy_n(images + pixel * channels + of.begin, (end - begin) * copied, out);
        out = std::fill_n(out, (run - end) * copied, 0.0f);
      }
  }
}

void aligned_tiles(const uint32_t* words, Shape shape, int64_t patterns, int64_t taps,
    uint32_t* tiles, const Exec& exec) {
  const AlignedRows rows(shape.rows, patterns);
  const int64_t row_words = words_per_row(shape.cols), tile_row_words = tile_words(shape.cols);
  constexpr int64_t kGrain = 1 << 12; // words worth waking a thread for
  const auto columns_of = [&](const uint32_t* row, int64_t tile_word) {
    const int64_t word = tile_word * kTileColumns / kWordBits;
    const uint64_t next = word + 1 < row_words ? row[word + 1] : 0;
    const uint64_t both = next << kWordBits | row[word];
    return static_cast<uint32_t>(both >> tile_word * kTileColumns % kWordBits) &
           low_bits(kTileColumns);
  };
  for (int64_t p = 0; p < patterns; ++p)
    exec.parallel.run(0, rows.blocks(p), ceil_div(kGrain, kBlockRows * row_words + 1),
        [&](int64_t begin, int64_t end) {
          std::vector<uint32_t> turned(taps > 1 ? row_words : 0);
          for (int64_t block = begin; block < end; ++block) {
            uint32_t* tile = tiles + (rows.first_block(p) + block) * tile_row_words * kBlockRows;
            for (int64_t lane = 0; lane < kBlockRows; ++lane) {
              const int64_t row = rows.row(p, block * kBlockRows + lane);
              const uint32_t* bits = words + row * row_words;
              if (row < shape.rows && taps > 1) {
                turn_row(bits, shape.cols, taps, turned.data());
                bits = turned.data();
              }
              for (int64_t w = 0; w < tile_row_words; ++w)
                tile[w * kBlockRows + lane] = row < shape.rows ? columns_of(bits, w) : 0;
            }
          }
        });
}

// A pass stores its y after it has read all of its x. Another thread must not read it then, nor
// another pass for more rows.
bool can_be_in_place(const AlignedLinear& p, const Exec& exec) {
  const Passes& passes = MK_BY_ISA(exec.isa, kPasses);
  return p.rows == p.cols && p.patterns == 1 && !p.patches &&
         AlignedRows(p.rows, 1).all_blocks() <= passes.blocks &&
         (exec.parallel.threads() == 1 || share_tokens(p, passes, exec));
}

void aligned_linear(const AlignedLinear& p, const Exec& exec) {
  const Kernels kernels(exec.isa);
  const Passes& passes = kernels.passes;
  const AlignedRows rows(p.rows, p.patterns);
  std::vector<float> first_row(p.period < p.cols ? p.cols : 0); // a short prototype, repeated
  repeat_values(p.values, p.period, static_cast<int64_t>(first_row.size()), first_row.data());

  // Blocks [begin, end) of a pattern.
  const auto tile_of = [&](int64_t pattern, int64_t begin, int64_t end) {
    const float* values = first_row.empty() ? p.values + pattern * p.cols : first_row.data();
    return Tile(p, rows, values, pattern, begin, end);
  };
  // Blocks [begin, end) of all patterns, counted one pattern after the other.
  const auto tiles_in_turn = [&](int64_t begin, int64_t end) {
    std::vector<Tile> tiles;
    for (int64_t pattern = 0, first = 0; pattern < p.patterns && first < end; ++pattern) {
      const int64_t last = first + rows.blocks(pattern);
      if (std::max(begin, first) < std::min(end, last))
        tiles.push_back(
            tile_of(pattern, std::max(begin, first) - first, std::min(end, last) - first));
      first = last;
    }
    return tiles;
  };
  // Blocks [begin, end) of each pattern.
  const auto tiles_of_each = [&](int64_t begin, int64_t end) {
    std::vector<Tile> tiles;
    for (int64_t pattern = 0; pattern < p.patterns && begin < rows.blocks(pattern); ++pattern)
      tiles.push_back(tile_of(pattern, begin, std::min(end, rows.blocks(pattern))));
    return tiles;
  };

  // All patterns of a few tokens come before the next tokens, so that the outputs they share stay
  // in the cache.
  const auto multiply = [&](const std::vector<Tile>& tiles, int64_t token, int64_t token_end) {
    int64_t most = 0;
    for (const Tile& tile : tiles)
      most = std::max(most, tile.blocks());
    Workspace space(p, passes, most);
    while (token < token_end) {
      const Pass& pass = passes.first_of(token_end - token);
      const Tokens tokens(p, token, pass.tokens, space);
      for (const Tile& tile : tiles)
        multiply_tile(p, tile, kernels, pass, tokens, space);
      token += pass.tokens;
    }
  };
  // Blocks [begin, end), as many at once as `tiles_of` may make tiles of.
  const auto multiply_all = [&](const auto& tiles_of, int64_t begin, int64_t end, int64_t token,
                                int64_t token_end) {
    for (int64_t next; begin < end; begin = next) {
      next = begin + std::min(passes.blocks, end - begin);
      multiply(tiles_of(begin, next), token, token_end);
    }
  };

  // Threads share tokens, each building its own tables, or blocks when there are few tokens. What
  // adjacent patterns make shares cache lines; threads whose patterns do take rows of each instead.
  constexpr int64_t kGrain = 1 << 18; // products worth waking a thread for
  const int64_t blocks = rows.all_blocks(), block = std::max<int64_t>(p.cols, 1) * kBlockRows;
  const int64_t unit = passes.unit(), units = ceil_div(p.tokens, unit);
  const int64_t threads = exec.parallel.threads();
  if (share_tokens(p, passes, exec))
    exec.parallel.run(
        0, units, ceil_div(kGrain, blocks * block * unit + 1), [&](int64_t begin, int64_t end) {
          multiply_all(tiles_in_turn, 0, blocks, begin * unit, std::min(end * unit, p.tokens));
        });
  else if (p.tokens == 0)
    return;
  else if (p.patterns % (kBlockRows * threads) != 0 && rows.blocks(0) >= threads)
    exec.parallel.run(0, rows.blocks(0), ceil_div(kGrain, p.tokens * block * p.patterns),
        [&](int64_t begin, int64_t end) { multiply_all(tiles_of_each, begin, end, 0, p.tokens); });
  else
    exec.parallel.run(0, blocks, ceil_div(kGrain, p.tokens * block),
        [&](int64_t begin, int64_t end) { multiply_all(tiles_in_turn, begin, end, 0, p.tokens); });
}

} // namespace masked_kernels
