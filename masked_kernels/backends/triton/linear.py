"""masked_linear: ``y = scale * x (w ⊙ m)ᵀ + bias`` with the weight decoded inside the product."""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import (
    dot_dtype,
    dot_precision,
    is_wide,
    load_weight_of_rows,
    on_device,
    row_offsets,
    weight_arguments,
)
from .bits import decoded
from .linear_small import aligned_linear


def masked_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    tokens, cols = x.shape
    rows = words.shape[0]
    y = x.new_empty((tokens, rows))
    if y.numel() == 0:
        return y
    plan = config.linear_plan(tokens, rows, cols, values.numel(), x.dtype)
    if plan == "planes":
        return aligned_linear(x, values, words, bias, scale)
    if plan == "library":
        return F.linear(x, decoded(values, words, cols, scale), bias)
    tile = config.linear_tile(tokens, rows, x.dtype)
    with on_device(x):
        _masked_linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(tokens, tile.tokens),)](
            x,
            weight_arguments(values, words, cols, cols),
            bias,
            scale,
            y,
            tokens,
            rows,
            x.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            tile.rows,
            tile.tokens,
            tile.depth,
            cols % tile.depth == 0,
            is_wide(values),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y


@triton.jit
def _masked_linear_kernel(
    x,
    weight,
    bias,
    scale,
    y,
    tokens,
    rows,
    stride,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of y; the weight is the left operand, which tensor cores take from registers."""
    cols = weight[2]
    down = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) // down * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    lane = tl.arange(0, DEPTH)
    offsets = row_offsets(row, row < rows, weight, WIDE)
    at = x + token[:, None] * stride[0] + lane.to(tl.int64)[None, :] * stride[1]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for col in range(0, cols, DEPTH):
        w = load_weight_of_rows(weight, row, row < rows, offsets, col, DEPTH, WHOLE)
        inside = (token < tokens)[:, None]
        if not WHOLE:
            inside &= (col + lane < cols)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)  # [TOKENS, DEPTH]
        acc = tl.dot(w.to(DOT), tl.trans(tile.to(DOT)), acc, input_precision=PRECISION)
        at += DEPTH * stride[1]
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    out = y + token[:, None] * rows + row[None, :]
    ok = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(out, tl.trans(acc).to(y.dtype.element_ty), mask=ok)
