"""Gradients of masked_linear and scored_linear: by x, by a dense weight, by the scores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import (
    add_product,
    advanced,
    dot_dtype,
    dot_precision,
    load_weight,
    on_device,
    program_tile,
    row_starts,
    split,
    store_tile,
    weight_arguments,
)
from .bits import decoded
from .epilogue import WeightGrad, masked_grad, scored_grad, store_grad
from .settings import settings_of


def masked_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    tokens, rows = grad_y.shape
    grad_x = grad_y.new_empty((tokens, cols))
    if grad_x.numel() == 0:
        return grad_x
    if tokens >= config.many_tokens(grad_y.dtype, settings_of(grad_y)):
        return grad_y @ decoded(values, words, cols, scale)
    tile = config.linear_tile(tokens, cols, grad_y.dtype, settings_of(grad_y))
    grid = (config.cdiv(cols, tile.rows) * config.cdiv(tokens, tile.tokens),)
    with on_device(grad_y):
        _masked_linear_grad_x_kernel[grid](
            grad_y,
            weight_arguments(values, words, cols, tile.rows),
            scale,
            grad_x,
            tokens,
            rows,
            grad_y.stride(),
            dot_dtype(grad_y.dtype),
            dot_precision(),
            tile.depth,
            tile.tokens,
            tile.rows,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return grad_x


def masked_linear_grad_weight(
    grad_y: Tensor, x: Tensor, words: Tensor, scale: Tensor | None
) -> Tensor:
    grad = grad_y.new_empty((grad_y.shape[1], x.shape[1]))
    fill_grad(masked_grad(grad, words, scale), grad_y, x)
    return grad


def scored_linear_grad_scores(
    grad_y: Tensor, x: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    grad = scores.new_empty(scores.shape)
    fill_grad(scored_grad(grad, values, scores, scale, absolute), grad_y, x)
    return grad


def fill_grad(target: WeightGrad, grad_y: Tensor, x: Tensor) -> None:
    """Fill the gradient with what becomes of ``grad_yᵀ x``."""
    if target.grad.numel() == 0:
        return
    tokens = x.shape[0]
    if (
        tokens > 0
        and config.grad_plan(tokens, x.dtype, dot_precision(), settings_of(x)) == "library"
    ):
        with on_device(x):
            target.add_parts(_float32_product(grad_y.t(), x).unsqueeze(0))
        return
    tile = config.grad_tile(target.rows, x.dtype)
    blocks = config.cdiv(target.rows, tile.rows) * config.cdiv(target.cols, config.GRAD_COLS)
    parts, length = split(x, blocks, tokens, tile.depth)
    destination = target.destination(parts)
    with on_device(x):
        _masked_linear_grad_weight_kernel[(blocks, parts)](
            grad_y,
            x,
            destination,
            target.arguments(),
            tokens,
            length,
            grad_y.stride(),
            x.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            parts == 1,
            tile.rows,
            config.GRAD_COLS,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        target.add_parts(destination)


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """The sums of 16-bit products before they are rounded."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@triton.jit
def _masked_linear_grad_x_kernel(
    grad_y,
    weight,
    scale,
    grad_x,
    tokens,
    rows,
    stride,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile of grad_x, summed over the rows of the weight."""
    cols, period = weight[2], weight[4]
    token, first = program_tile(cols, TOKENS, COLS)
    token = token.to(tl.int64)
    lane = tl.arange(0, DEPTH)
    starts = row_starts(lane, first, cols, period)
    step = tl.cast(cols, tl.int64) * DEPTH
    if period is not None:
        step %= period
    acc = tl.zeros((TOKENS, COLS), tl.float32)
    for start in range(0, rows, DEPTH):
        row = start + lane
        w = load_weight(weight, row, row < rows, starts, first, COLS)  # [DEPTH, COLS]
        at = grad_y + token[:, None] * stride[0] + row.to(tl.int64)[None, :] * stride[1]
        tile = tl.load(at, mask=(token < tokens)[:, None] & (row < rows)[None, :], other=0.0)
        acc = add_product(acc, tile.to(DOT), w.to(DOT), PRECISION)
        starts = advanced(starts, step, period)
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    store_tile(grad_x, acc, tokens, cols, token, first, COLS)


@triton.jit
def _masked_linear_grad_weight_kernel(
    grad_y,
    x,
    out,
    target,
    tokens,
    tokens_per_part,
    stride_y,
    stride_x,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of ``grad_yᵀ x``, summed over the tokens of one part."""
    rows, cols = target[4], target[5]
    row, first = program_tile(cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)
    begin = tl.program_id(1) * tokens_per_part
    end = tl.minimum(begin + tokens_per_part, tokens)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, DEPTH):
        token = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(
            grad_y + row.to(tl.int64)[:, None] * stride_y[1] + token[None, :] * stride_y[0],
            mask=(row < rows)[:, None] & (token < end)[None, :],
            other=0.0,
        )  # [ROWS, DEPTH]
        right = tl.load(
            x + token[:, None] * stride_x[0] + col.to(tl.int64)[None, :] * stride_x[1],
            mask=(token < end)[:, None] & (col < cols)[None, :],
            other=0.0,
        )  # [DEPTH, COLS]
        acc = add_product(acc, left.to(DOT), right.to(DOT), PRECISION)
    store_grad(out, target, acc, row, first, FINISH, COLS)
