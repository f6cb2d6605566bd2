"""masked_conv2d and its gradient by x as products without an im2col: a tile of the image is
gathered while it is loaded, by its strides, so both memory formats are read in place.

Columns of the weight keep their flat order: channel, then kernel position. Convolutions with one
channel a group go to ``depthwise.py``, pointwise ones on channels_last to ``linear.py``.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._layout import conv_memory_format
from . import config
from ._conv import (
    Geometry,
    as_image,
    as_tokens,
    convolution_grads,
    in_bounds,
    is_channels_last,
    new_image,
    pixel_of,
    window,
    window_back,
)
from ._helpers import (
    dot_dtype,
    dot_precision,
    is_wide,
    load_weight_of_rows,
    on_device,
    row_offsets,
    row_starts,
    weight_arguments,
)
from .bits import decoded
from .depthwise import depthwise_conv2d, depthwise_conv2d_grad_x
from .linear import masked_linear
from .linear_grad import masked_linear_grad_x


def masked_conv2d(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x.shape, kernel_size, stride, padding, dilation, groups)
    if geometry.pointwise and is_channels_last(x):
        return as_image(masked_linear(as_tokens(x), values, words, bias, scale), x)
    rows = words.shape[0]
    y = new_image(x, (x.shape[0], rows, *geometry.out_size))
    if y.numel() == 0:
        return y
    if geometry.group_channels == 1:
        depthwise_conv2d(y, x, values, words, bias, scale, geometry)
        return y
    if config.conv_plan(geometry.out_pixels, x.dtype) == "library":
        weight = decoded(values, words, geometry.cols, scale).view(
            rows, geometry.group_channels, *kernel_size
        )
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y.contiguous(memory_format=conv_memory_format(x))
    group_rows = rows // groups
    tile = config.linear_tile(geometry.out_pixels, group_rows, x.dtype)
    tiles = triton.cdiv(group_rows, tile.rows) * triton.cdiv(geometry.out_pixels, tile.tokens)
    with on_device(x):
        _masked_conv2d_kernel[(tiles, groups)](
            x,
            weight_arguments(values, words, geometry.cols, geometry.cols),
            bias,
            scale,
            y,
            geometry.arguments(),
            geometry.out_pixels,
            group_rows,
            geometry.group_channels,
            x.stride(),
            y.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            *kernel_size,
            tile.rows,
            tile.tokens,
            tile.depth,
            geometry.cols % tile.depth == 0,
            is_wide(values),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y


def masked_conv2d_grad_x(
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    x_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x_size, kernel_size, stride, padding, dilation, groups)
    if geometry.pointwise and is_channels_last(grad_y):
        tokens = masked_linear_grad_x(as_tokens(grad_y), values, words, scale, x_size[1])
        return as_image(tokens, grad_y)
    grad_x = new_image(grad_y, x_size)
    if grad_x.numel() == 0:
        return grad_x
    if geometry.group_channels == 1:
        depthwise_conv2d_grad_x(grad_x, grad_y, values, words, scale, geometry)
        return grad_x
    if config.conv_plan(geometry.in_pixels, grad_y.dtype) == "library":
        weight = decoded(values, words, geometry.cols, scale).view(
            words.shape[0], geometry.group_channels, *kernel_size
        )
        # Of x only the size and layout matter; grad_x has them.
        return convolution_grads(grad_y, grad_x, weight, geometry, (True, False))[0].contiguous(
            memory_format=conv_memory_format(grad_y)
        )
    group_rows = words.shape[0] // groups
    tile = config.linear_tile(geometry.in_pixels, geometry.group_channels, grad_y.dtype)
    reach = tile.rows * kernel_size[0] * kernel_size[1]
    tiles = triton.cdiv(geometry.group_channels, tile.rows) * triton.cdiv(
        geometry.in_pixels, tile.tokens
    )
    with on_device(grad_y):
        _masked_conv2d_grad_x_kernel[(tiles, groups)](
            grad_y,
            weight_arguments(values, words, geometry.cols, reach),
            scale,
            grad_x,
            geometry.arguments(),
            geometry.in_pixels,
            group_rows,
            geometry.group_channels,
            grad_y.stride(),
            grad_x.stride(),
            dot_dtype(grad_y.dtype),
            dot_precision(),
            *kernel_size,
            tile.depth,
            tile.tokens,
            tile.rows,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return grad_x


@triton.jit
def _masked_conv2d_kernel(
    x,
    weight,
    bias,
    scale,
    y,
    geometry,
    pixels,
    group_rows,
    group_channels,
    stride_x,
    stride_y,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of y [rows of a group, output pixels]."""
    cols = weight[2]
    group = tl.program_id(1)
    down = tl.cdiv(group_rows, ROWS)
    in_group = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    row, row_ok = group * group_rows + in_group, in_group < group_rows
    pixel = tl.program_id(0) // down * PIXELS + tl.arange(0, PIXELS)
    image, out_row, out_col = pixel_of(pixel, geometry[2], geometry[3])
    top, left = window(geometry, out_row, out_col)
    base = x + group.to(tl.int64) * group_channels * stride_x[1] + image * stride_x[0]
    base += top.to(tl.int64) * stride_x[2] + left.to(tl.int64) * stride_x[3]  # [PIXELS]
    lane = tl.arange(0, DEPTH)
    offsets = row_offsets(row, row_ok, weight, WIDE)
    acc = tl.zeros((ROWS, PIXELS), tl.float32)
    for col in range(0, cols, DEPTH):
        w = load_weight_of_rows(weight, row, row_ok, offsets, col, DEPTH, WHOLE)
        channel = (col + lane) // (KH * KW)
        r = (col + lane) // KW % KH * geometry[8]
        s = (col + lane) % KW * geometry[9]
        offset = channel.to(tl.int64) * stride_x[1] + r.to(tl.int64) * stride_x[2]
        offset += s.to(tl.int64) * stride_x[3]  # [DEPTH]
        ok = in_bounds(
            top[:, None] + r[None, :], left[:, None] + s[None, :], geometry[0], geometry[1]
        )
        ok &= (pixel < pixels)[:, None] & (col + lane < cols)[None, :]
        tile = tl.load(base[:, None] + offset[None, :], mask=ok, other=0.0)
        acc = tl.dot(w.to(DOT), tl.trans(tile.to(DOT)), acc, input_precision=PRECISION)
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    out = image * stride_y[0] + out_row.to(tl.int64) * stride_y[2]
    out += out_col.to(tl.int64) * stride_y[3]
    out = y + out[:, None] + row.to(tl.int64)[None, :] * stride_y[1]
    ok = (pixel < pixels)[:, None] & row_ok[None, :]
    tl.store(out, tl.trans(acc).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _load_weight_at(weight, row, row_ok, starts, col, col_ok, first):
    """Masked weights [row, col] of columns apart from one another; starts are for ``first``."""
    values, words, _cols, words_per_row, _period = weight
    ok = row_ok[:, None] & col_ok[None, :]
    at = words + row.to(tl.int64)[:, None] * words_per_row + (col // 32)[None, :]
    bits = (tl.load(at, mask=ok, other=0) >> (col % 32)[None, :]) & 1
    value = tl.load(values + starts[:, None] + (col - first)[None, :], mask=ok, other=0.0)
    return tl.where(bits != 0, value, 0.0)


@triton.jit
def _masked_conv2d_grad_x_kernel(
    grad_y,
    weight,
    scale,
    grad_x,
    geometry,
    pixels,
    group_rows,
    group_channels,
    stride_y,
    stride_x,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DEPTH: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of grad_x [input pixels, channels of a group]."""
    cols, period = weight[2], weight[4]
    group = tl.program_id(1)
    across = tl.cdiv(group_channels, CHANNELS)
    in_group = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    channel_ok = in_group < group_channels
    pixel = tl.program_id(0) // across * PIXELS + tl.arange(0, PIXELS)
    image, x_row, x_col = pixel_of(pixel, geometry[0], geometry[1])
    lane = tl.arange(0, DEPTH)
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for position in range(KH * KW):
        out_row, out_col, ok = window_back(geometry, x_row, x_col, position // KW, position % KW)
        ok &= pixel < pixels
        base = grad_y + image * stride_y[0] + out_row.to(tl.int64) * stride_y[2]
        base += out_col.to(tl.int64) * stride_y[3]  # [PIXELS]
        col = in_group * (KH * KW) + position
        first = tl.program_id(0) % across * (CHANNELS * KH * KW) + position
        for start in range(0, group_rows, DEPTH):
            row, row_ok = group * group_rows + start + lane, start + lane < group_rows
            starts = row_starts(row, first, cols, period)
            w = _load_weight_at(weight, row, row_ok, starts, col, channel_ok, first)
            at = base[:, None] + row.to(tl.int64)[None, :] * stride_y[1]
            tile = tl.load(at, mask=ok[:, None] & row_ok[None, :], other=0.0)
            acc = tl.dot(tile.to(DOT), w.to(DOT), acc, input_precision=PRECISION)
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    out = image * stride_x[0] + x_row.to(tl.int64) * stride_x[2]
    out += x_col.to(tl.int64) * stride_x[3]
    channel = group * group_channels + in_group
    out = grad_x + out[:, None] + channel.to(tl.int64)[None, :] * stride_x[1]
    ok = (pixel < pixels)[:, None] & channel_ok[None, :]
    tl.store(out, acc.to(grad_x.dtype.element_ty), mask=ok)
