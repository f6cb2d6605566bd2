"""masked_conv2d and its gradient by x as products without an im2col: a tile of the image is
gathered while it is loaded, by its strides, so both memory formats are read in place.

Columns of the weight keep their flat order: channel, then kernel position. Convolutions with one
channel a group go to ``depthwise.py``, pointwise ones on channels_last to ``linear.py``.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _fused
from .._layout import conv_memory_format
from . import config
from ._conv import (
    Geometry,
    add_residual_of_image,
    as_image,
    as_tokens,
    convolution_grads,
    image_at,
    in_bounds,
    is_channels_last,
    new_image,
    pixel_of,
    window,
    window_back,
)
from ._helpers import (
    add_product,
    dot_dtype,
    dot_precision,
    on_device,
    row_starts,
    split,
    weight_arguments,
    wrapped_index,
)
from .bits import decoded, decoded_channels_last
from .depthwise import depthwise_conv2d, depthwise_conv2d_grad_x
from .linear import multiplied
from .linear_grad import masked_linear_grad_x
from .output import Output, finished
from .row_weight import load_weight_of_rows, row_offsets, row_weight
from .settings import settings_of


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
    output = Output(bias, scale)
    return _convolved(x, values, words, output, geometry, conv_memory_format(x))


def masked_conv2d_fused(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x.shape, kernel_size, stride, padding, dilation, groups)
    output = Output(affine=affine, activation=activation, residual=residual)
    return _convolved(x, values, words, output, geometry, torch.channels_last)


masked_conv2d_chain = functools.partial(_fused.masked_conv2d_chain, masked_conv2d_fused)


def _convolved(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    output: Output,
    geometry: Geometry,
    memory_format: torch.memory_format,
) -> Tensor:
    """What becomes of the convolution, in a memory format."""
    if geometry.pointwise and is_channels_last(x):
        return as_image(multiplied(as_tokens(x), values, words, _of_tokens(output)), x)
    rows = words.shape[0]
    y = new_image(x, (x.shape[0], rows, *geometry.out_size), memory_format)
    if y.numel() == 0:
        return y
    fused = output.affine is not None
    if geometry.group_channels == 1:
        depthwise_conv2d(y, x, values, words, output, geometry)
    elif (
        config.conv_plan(geometry.out_pixels, geometry.cols, x.dtype, fused, settings_of(x))
        == "library"
    ):
        y = F.conv2d(
            x.contiguous(memory_format=memory_format),
            _decoded_filters(values, words, output.scale, geometry, memory_format),
            output.bias,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
        ).contiguous(memory_format=memory_format)
        if fused:
            with on_device(x):
                tokens = as_tokens(y)
                _of_tokens(output).finish(tokens, tokens.unsqueeze(0))
    else:
        _convolve_tiles(y, x, values, words, output, geometry)
    return y


def _decoded_filters(
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    geometry: Geometry,
    memory_format: torch.memory_format,
) -> Tensor:
    """``[rows, channels of a group, kh, kw]`` in a memory format, so that no library copies it."""
    channels, kernel = geometry.group_channels, geometry.kernel
    if memory_format == torch.channels_last:
        return decoded_channels_last(values, words, scale, channels, kernel)
    return decoded(values, words, geometry.cols, scale).view(words.shape[0], channels, *kernel)


def _of_tokens(output: Output) -> Output:
    """With the residual as tokens."""
    if output.residual is None:
        return output
    return dataclasses.replace(output, residual=as_tokens(output.residual))


def _convolve_tiles(
    y: Tensor, x: Tensor, values: Tensor, words: Tensor, output: Output, geometry: Geometry
) -> None:
    group_rows = words.shape[0] // geometry.groups
    tile = config.linear_tile(geometry.out_pixels, group_rows, x.dtype, settings_of(x))
    tiles = config.cdiv(group_rows, tile.rows) * config.cdiv(geometry.out_pixels, tile.tokens)
    parts, length = split(x, tiles * geometry.groups, geometry.cols, tile.depth)
    weight = row_weight(values, words, geometry.cols)
    sums = y
    if parts > 1:
        size = (parts, geometry.out_pixels, words.shape[0])
        sums = y.new_empty(size, dtype=torch.float32)
    with on_device(x):
        _masked_conv2d_kernel[(tiles, geometry.groups, parts)](
            x,
            weight.arguments,
            output.arguments(),
            sums,
            geometry.arguments(),
            geometry.out_pixels,
            length,
            group_rows,
            geometry.group_channels,
            x.stride(),
            y.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            output.activation,
            parts == 1,
            *geometry.kernel,
            tile.rows,
            tile.tokens,
            tile.depth,
            geometry.cols % tile.depth == 0,
            *weight.options,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if parts > 1:
            image = new_image(y, y.shape, torch.channels_last)
            _of_tokens(output).finish(as_tokens(image), sums)
            y.copy_(image)


def masked_conv2d_grad_x(
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = Geometry.of(x.shape, kernel_size, stride, padding, dilation, groups)
    if geometry.pointwise and is_channels_last(grad_y):
        tokens = masked_linear_grad_x(as_tokens(grad_y), values, words, scale, x.shape[1])
        return as_image(tokens, grad_y)
    grad_x = new_image(grad_y, x.shape)
    if grad_x.numel() == 0:
        return grad_x
    if geometry.group_channels == 1:
        depthwise_conv2d_grad_x(grad_x, grad_y, values, words, scale, geometry)
        return grad_x
    settings, dtype = settings_of(grad_y), grad_y.dtype
    if config.conv_plan(geometry.in_pixels, geometry.cols, dtype, False, settings) == "library":
        memory_format = conv_memory_format(grad_y)
        weight = _decoded_filters(values, words, scale, geometry, memory_format)
        # Of x only the size and layout matter; grad_x has them.
        return convolution_grads(grad_y, grad_x, weight, geometry, (True, False))[0].contiguous(
            memory_format=memory_format
        )
    group_rows = words.shape[0] // groups
    tile = config.linear_tile(geometry.in_pixels, geometry.group_channels, dtype, settings)
    reach = tile.rows * kernel_size[0] * kernel_size[1]
    tiles = config.cdiv(geometry.group_channels, tile.rows) * config.cdiv(
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
    output,
    y,
    geometry,
    pixels,
    cols_per_part,
    group_rows,
    group_channels,
    stride_x,
    stride_y,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    COPIES: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y [rows of a group, output pixels], or of its sums over a part of the columns."""
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
    offsets = row_offsets(row, row_ok, weight, COPIES, VECTOR, WIDE)
    begin = tl.program_id(2) * cols_per_part
    end = tl.minimum(begin + cols_per_part, cols)
    acc = tl.zeros((ROWS, PIXELS), tl.float32)
    for col in range(begin, end, DEPTH):
        w = load_weight_of_rows(weight, row, row_ok, offsets, col, DEPTH, WHOLE, ASM)
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
        acc = add_product(acc, w.to(DOT), tl.trans(tile.to(DOT)), PRECISION)
    rows = group_rows * tl.num_programs(1)
    ok = (pixel < pixels)[:, None] & row_ok[None, :]
    if FINISH:
        sums = tl.trans(finished(acc, output, row, row_ok, rows, ACTIVATION, 0))
        sums = add_residual_of_image(sums, output, image, out_row, out_col, row, ok)
        at = image_at(stride_y, image, out_row, out_col, row)
    else:
        sums = tl.trans(acc)
        at = (tl.program_id(2).to(tl.int64) * pixels + pixel)[:, None] * rows + row[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _load_weight_at(weight, row, row_ok, starts, col, col_ok, first):
    """Masked weights [row, col] of columns apart from one another; starts are for ``first``."""
    values, words, _cols, words_per_row, period = weight
    ok = row_ok[:, None] & col_ok[None, :]
    at = words + row.to(tl.int64)[:, None] * words_per_row + (col // 32)[None, :]
    bits = (tl.load(at, mask=ok, other=0) >> (col % 32)[None, :]) & 1
    value = tl.load(values + wrapped_index(starts, col - first, period), mask=ok, other=0.0)
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
            acc = add_product(acc, tile.to(DOT), w.to(DOT), PRECISION)
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    at = image_at(stride_x, image, x_row, x_col, group * group_channels + in_group)
    ok = (pixel < pixels)[:, None] & channel_ok[None, :]
    tl.store(grad_x + at, acc.to(grad_x.dtype.element_ty), mask=ok)
