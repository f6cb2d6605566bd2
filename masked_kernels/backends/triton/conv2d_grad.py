"""Gradients of masked_conv2d by a dense weight and of scored_conv2d by the scores: the sum over
output pixels of grad_y times the image gathered under the kernel.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from .. import _grads
from . import config, linear_grad
from ._conv import (
    Geometry,
    as_tokens,
    convolution_grads,
    in_bounds,
    is_channels_last,
    pixel_of,
    window,
)
from ._helpers import add_product, dot_dtype, dot_precision, on_device, split
from .conv2d import masked_conv2d_grad_x
from .depthwise_grad import fill_depthwise_grad
from .epilogue import WeightGrad, masked_grad, scored_grad, store_grad
from .settings import settings_of


def masked_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x.shape, kernel_size, stride, padding, dilation, groups)
    grad = grad_y.new_empty((words.shape[0], geometry.group_channels, *kernel_size))
    _fill(masked_grad(grad, words, scale), grad_y, x, geometry)
    return grad


def scored_conv2d_grad_scores(
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    scores: Tensor,
    scale: Tensor | None,
    absolute: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x.shape, scores.shape[2:], stride, padding, dilation, groups)
    grad = scores.new_empty(scores.shape)
    _fill(scored_grad(grad, values, scores, scale, absolute), grad_y, x, geometry)
    return grad


scored_conv2d_grads = functools.partial(
    _grads.scored_conv2d_grads, masked_conv2d_grad_x, scored_conv2d_grad_scores
)


def _fill(target: WeightGrad, grad_y: Tensor, x: Tensor, geometry: Geometry) -> None:
    if target.grad.numel() == 0:
        return
    if geometry.pointwise and is_channels_last(x) and is_channels_last(grad_y):
        linear_grad.fill_grad(target, as_tokens(grad_y), as_tokens(x))
        return
    if geometry.group_channels == 1:
        fill_depthwise_grad(target, grad_y, x, geometry)
        return
    settings = settings_of(x)
    if config.conv_plan(geometry.out_pixels, geometry.cols, x.dtype, False, settings) == "library":
        size = (target.rows, geometry.group_channels, *geometry.kernel)
        weight = x.new_empty(size)  # only its size and layout matter
        grad = convolution_grads(grad_y, x, weight, geometry, (False, True))[1]
        positions = geometry.positions if is_channels_last(grad) else 1
        grad = grad.permute(0, 2, 3, 1) if positions > 1 else grad.contiguous()
        with on_device(x):
            target.add_parts(grad.view(1, target.rows, target.cols), positions)
        return
    group_rows = target.rows // geometry.groups
    tile = config.grad_tile(group_rows, x.dtype)
    blocks = config.cdiv(group_rows, tile.rows) * config.cdiv(target.cols, config.GRAD_COLS)
    parts, length = split(x, blocks * geometry.groups, geometry.out_pixels, tile.depth)
    destination = target.destination(parts)
    with on_device(x):
        _masked_conv2d_grad_weight_kernel[(blocks, parts, geometry.groups)](
            grad_y,
            x,
            destination,
            target.arguments(),
            geometry.arguments(),
            geometry.out_pixels,
            length,
            group_rows,
            geometry.group_channels,
            grad_y.stride(),
            x.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            parts == 1,
            *geometry.kernel,
            tile.rows,
            config.GRAD_COLS,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        target.add_parts(destination)


@triton.jit
def _masked_conv2d_grad_weight_kernel(
    grad_y,
    x,
    out,
    target,
    geometry,
    pixels,
    pixels_per_part,
    group_rows,
    group_channels,
    stride_y,
    stride_x,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FINISH: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of the gradient [rows of a group, columns], summed over the pixels of one part."""
    cols = target[5]
    group = tl.program_id(2)
    across = tl.cdiv(cols, COLS)
    in_group = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    row = group * group_rows + in_group
    first = tl.program_id(0) % across * COLS
    col = first + tl.arange(0, COLS)
    channel = group.to(tl.int64) * group_channels + col // (KH * KW)
    r, s = col // KW % KH * geometry[8], col % KW * geometry[9]
    x_offset = channel * stride_x[1] + r.to(tl.int64) * stride_x[2]
    x_offset += s.to(tl.int64) * stride_x[3]  # [COLS]
    begin = tl.program_id(1) * pixels_per_part
    end = tl.minimum(begin + pixels_per_part, pixels)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, DEPTH):
        pixel = start + tl.arange(0, DEPTH)
        image, out_row, out_col = pixel_of(pixel, geometry[2], geometry[3])
        at = image * stride_y[0] + out_row.to(tl.int64) * stride_y[2]
        at += out_col.to(tl.int64) * stride_y[3]  # [DEPTH]
        left = tl.load(
            grad_y + row.to(tl.int64)[:, None] * stride_y[1] + at[None, :],
            mask=(in_group < group_rows)[:, None] & (pixel < end)[None, :],
            other=0.0,
        )  # [ROWS, DEPTH]
        top, side = window(geometry, out_row, out_col)
        at = image * stride_x[0] + top.to(tl.int64) * stride_x[2]
        at += side.to(tl.int64) * stride_x[3]
        ok = in_bounds(
            top[:, None] + r[None, :], side[:, None] + s[None, :], geometry[0], geometry[1]
        )
        ok &= (pixel < end)[:, None] & (col < cols)[None, :]
        right = tl.load(x + at[:, None] + x_offset[None, :], mask=ok, other=0.0)  # [DEPTH, COLS]
        acc = add_product(acc, left.to(DOT), right.to(DOT), PRECISION)
    # Rows past the group belong to the next one: send them past the end, where nothing is stored.
    row = tl.where(in_group < group_rows, row, target[4])
    store_grad(out, target, acc, row, first, FINISH, COLS)
