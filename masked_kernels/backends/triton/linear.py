"""masked_linear: ``y = scale * x (w ⊙ m)ᵀ + bias`` with the weight decoded inside the product."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import add_product, dot_dtype, dot_precision, on_device, split
from .bits import decoded
from .linear_small import aligned_linear
from .output import Output, add_residual_of_tokens, finished
from .row_weight import load_weight_of_rows, row_offsets, row_weight
from .settings import settings_of


def masked_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    return multiplied(x, values, words, Output(bias, scale))


def multiplied(x: Tensor, values: Tensor, words: Tensor, output: Output) -> Tensor:
    """What becomes of ``x (w ⊙ m)ᵀ``, ``[tokens, rows]``."""
    tokens, cols = x.shape
    rows = words.shape[0]
    y = x.new_empty((tokens, rows))
    if y.numel() == 0:
        return y
    fused = output.affine is not None
    plan = config.linear_plan(tokens, rows, cols, values.numel(), x.dtype, fused, settings_of(x))
    if plan == "planes":
        aligned_linear(y, x, values, words, output)
    elif plan == "library":
        y = F.linear(x, decoded(values, words, cols, output.scale), output.bias)
        if fused:
            with on_device(x):
                output.finish(y, y.unsqueeze(0))
    else:
        _multiply_tiles(y, x, values, words, output)
    return y


def _multiply_tiles(y: Tensor, x: Tensor, values: Tensor, words: Tensor, output: Output) -> None:
    (tokens, cols), rows = x.shape, words.shape[0]
    tile = config.linear_tile(tokens, rows, x.dtype, settings_of(x))
    tiles = config.cdiv(rows, tile.rows) * config.cdiv(tokens, tile.tokens)
    parts, length = split(x, tiles, cols, tile.depth)
    sums = y if parts == 1 else y.new_empty((parts, tokens, rows), dtype=torch.float32)
    weight = row_weight(values, words, cols)
    with on_device(x):
        _masked_linear_kernel[(tiles, parts)](
            x,
            weight.arguments,
            output.arguments(),
            sums,
            tokens,
            rows,
            length,
            x.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            output.activation,
            parts == 1,
            tile.rows,
            tile.tokens,
            tile.depth,
            cols % tile.depth == 0,
            *weight.options,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if parts > 1:
            output.finish(y, sums)


@triton.jit
def _masked_linear_kernel(
    x,
    weight,
    output,
    y,
    tokens,
    rows,
    cols_per_part,
    stride,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    COPIES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y, or of its sums over one part of the columns; the weight is the left operand,
    which tensor cores take from registers.
    """
    cols = weight[2]
    down = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) // down * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    lane = tl.arange(0, DEPTH)
    offsets = row_offsets(row, row < rows, weight, COPIES, VECTOR, WIDE)
    begin = tl.program_id(1) * cols_per_part
    end = tl.minimum(begin + cols_per_part, cols)
    at = x + token[:, None] * stride[0] + (begin + lane).to(tl.int64)[None, :] * stride[1]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for col in range(begin, end, DEPTH):
        w = load_weight_of_rows(weight, row, row < rows, offsets, col, DEPTH, WHOLE, ASM)
        inside = (token < tokens)[:, None]
        if not WHOLE:
            inside &= (col + lane < cols)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)  # [TOKENS, DEPTH]
        acc = add_product(acc, w.to(DOT), tl.trans(tile.to(DOT)), PRECISION)
        at += DEPTH * stride[1]
    ok = (token < tokens)[:, None] & (row < rows)[None, :]
    if FINISH:
        acc = finished(acc, output, row, row < rows, rows, ACTIVATION, 0)
    sums = tl.trans(acc)
    if FINISH:
        sums = add_residual_of_tokens(sums, output, token, row, ok)
    else:
        token += tl.program_id(1).to(tl.int64) * tokens
    tl.store(y + token[:, None] * rows + row[None, :], sums.to(y.dtype.element_ty), mask=ok)
