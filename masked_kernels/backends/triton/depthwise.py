"""Convolutions with one channel a group: sums of products of pixels, without tensor cores.

Masked filters are decoded once, float32 and by the kernel position, where a program that loads them
needs no bits. The convolution itself works on *strips*: some output pixels side by side in a row, a
sum each, so that an input pixel is loaded once for all of them. Row n of the weight reads channel
``n // rows_per_channel``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._conv import (
    Geometry,
    add_residual_of_image,
    image_at,
    in_bounds,
    pixel_of,
    window,
    window_back,
)
from ._helpers import load_weight, on_device, row_starts, split, weight_arguments
from .epilogue import WeightGrad, store_grad
from .output import Output, finished

_FILTERS = 16  # that a program decodes


def depthwise_conv2d(
    y: Tensor, x: Tensor, values: Tensor, words: Tensor, output: Output, geometry: Geometry
) -> None:
    """Fill ``y``."""
    rows = words.shape[0]
    height, width = geometry.out_size
    tile = config.strips_tile(rows, width, x.stride(1) == 1)
    strips = geometry.batch * height * triton.cdiv(width, tile.strip)
    grid = (triton.cdiv(strips, tile.strips) * triton.cdiv(rows, tile.rows),)
    with on_device(x):
        _depthwise_conv2d_kernel[grid](
            x,
            _filters(values, words, geometry.cols),
            output.arguments(),
            y,
            geometry.arguments(),
            strips,
            rows,
            rows // geometry.channels,
            x.stride(),
            y.stride(),
            output.activation,
            *geometry.kernel,
            geometry.stride[1],
            geometry.dilation[1],
            tile.strip,
            tile.strips,
            tile.rows,
        )


def _filters(values: Tensor, words: Tensor, cols: int) -> Tensor:
    """The masked weight ``[rows, cols]``, transposed, float32."""
    rows = words.shape[0]
    filters = values.new_empty((cols, rows), dtype=torch.float32)
    _filters_kernel[(triton.cdiv(rows, _FILTERS),)](
        weight_arguments(values, words, cols, cols),
        filters,
        rows,
        _FILTERS,
        max(32, triton.next_power_of_2(cols)),
    )
    return filters


def depthwise_conv2d_grad_x(
    grad_x: Tensor,
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    geometry: Geometry,
) -> None:
    """Fill ``grad_x``."""
    channels = geometry.channels
    tile = config.depthwise_tile(geometry.in_pixels, channels)
    grid = (triton.cdiv(geometry.in_pixels, tile.pixels) * triton.cdiv(channels, tile.rows),)
    with on_device(grad_y):
        _depthwise_conv2d_grad_x_kernel[grid](
            grad_y,
            _filters(values, words, geometry.cols),
            scale,
            grad_x,
            geometry.arguments(),
            geometry.in_pixels,
            channels,
            words.shape[0] // channels,
            grad_y.stride(),
            grad_x.stride(),
            *geometry.kernel,
            tile.pixels,
            tile.rows,
        )


def fill_depthwise_grad(target: WeightGrad, grad_y: Tensor, x: Tensor, geometry: Geometry) -> None:
    """Fill the gradient of the filters."""
    tile = config.depthwise_grad_tile(target.rows)
    blocks = triton.cdiv(target.rows, tile.rows)
    parts, length = split(x, blocks, geometry.out_pixels, tile.pixels)
    destination = target.destination(parts)
    with on_device(x):
        _depthwise_conv2d_grad_weight_kernel[(blocks, parts)](
            grad_y,
            x,
            destination,
            target.arguments(),
            geometry.arguments(),
            geometry.out_pixels,
            length,
            target.rows // geometry.channels,
            grad_y.stride(),
            x.stride(),
            parts == 1,
            *geometry.kernel,
            tile.pixels,
            tile.rows,
            max(32, triton.next_power_of_2(geometry.cols)),
        )
        target.add_parts(destination)


@triton.jit
def _filters_kernel(weight, filters, rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    starts = row_starts(row, 0, weight[2], weight[4])
    tile = load_weight(weight, row, row < rows, starts, 0, COLS)
    at = filters + col.to(tl.int64)[None, :] * rows + row[:, None]
    ok = (row < rows)[:, None] & (col < weight[2])[None, :]
    tl.store(at, tile.to(tl.float32), mask=ok)


@triton.jit
def _load_filter(filters, row, row_ok, rows, position):
    """float32 weights of the rows at one kernel position."""
    return tl.load(filters + tl.cast(position, tl.int64) * rows + row, mask=row_ok, other=0.0)


@triton.jit
def _depthwise_conv2d_kernel(
    x,
    filters,
    output,
    y,
    geometry,
    strips,
    rows,
    rows_per_channel,
    stride_x,
    stride_y,
    ACTIVATION: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    across = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    channel = row // rows_per_channel
    strip = tl.program_id(0) // across * STRIPS + tl.arange(0, STRIPS)
    image, out_row, out_col = pixel_of(strip, geometry[2], tl.cdiv(geometry[3], STRIP))
    out_col *= STRIP
    top, left = window(geometry, out_row, out_col)
    ok = (strip < strips)[:, None] & row_ok[None, :]
    sums = ()
    for _ in tl.static_range(STRIP):
        sums += (tl.zeros((STRIPS, ROWS), tl.float32),)
    for r in range(KH):
        w = ()
        for s in tl.static_range(KW):
            w += (_load_filter(filters, row, row_ok, rows, r * KW + s)[None, :],)
        down = top + r * geometry[8]
        base = x + image_at(stride_x, image, down, left, channel)
        for c in tl.static_range((STRIP - 1) * STRIDE + (KW - 1) * DILATION + 1):
            inside = in_bounds(down, left + c, geometry[0], geometry[1])
            tile = tl.load(base + c * stride_x[3], mask=ok & inside[:, None], other=0.0)
            tile = tile.to(tl.float32)
            new = ()
            for j in tl.static_range(STRIP):
                # Column c lies at kernel position (c - j * STRIDE) / DILATION of output pixel j.
                if (
                    c >= j * STRIDE
                    and (c - j * STRIDE) % DILATION == 0
                    and (c - j * STRIDE) // DILATION < KW
                ):
                    new += (sums[j] + tile * w[(c - j * STRIDE) // DILATION],)
                else:
                    new += (sums[j],)
            sums = new
    for j in tl.static_range(STRIP):
        col = out_col + j
        there = ok & (col < geometry[3])[:, None]
        done = finished(sums[j], output, row, row_ok, rows, ACTIVATION, 1)
        done = add_residual_of_image(done, output, image, out_row, col, row, there)
        at = image_at(stride_y, image, out_row, col, row)
        tl.store(y + at, done.to(y.dtype.element_ty), mask=there)


@triton.jit
def _depthwise_conv2d_grad_x_kernel(
    grad_y,
    filters,
    scale,
    grad_x,
    geometry,
    pixels,
    channels,
    rows_per_channel,
    stride_y,
    stride_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    across = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    channel_ok = channel < channels
    pixel = tl.program_id(0) // across * PIXELS + tl.arange(0, PIXELS)
    image, x_row, x_col = pixel_of(pixel, geometry[0], geometry[1])
    ok = (pixel < pixels)[:, None] & channel_ok[None, :]
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for position in range(KH * KW):
        out_row, out_col, there = window_back(geometry, x_row, x_col, position // KW, position % KW)
        at = image * stride_y[0] + out_row.to(tl.int64) * stride_y[2]
        at += out_col.to(tl.int64) * stride_y[3]
        for extra in range(rows_per_channel):
            row = channel * rows_per_channel + extra
            w = _load_filter(filters, row, channel_ok, channels * rows_per_channel, position)
            tile = tl.load(
                grad_y + at[:, None] + row.to(tl.int64)[None, :] * stride_y[1],
                mask=ok & there[:, None],
                other=0.0,
            )
            acc += tile.to(tl.float32) * w[None, :]
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    at = image_at(stride_x, image, x_row, x_col, channel)
    tl.store(grad_x + at, acc.to(grad_x.dtype.element_ty), mask=ok)


@triton.jit
def _depthwise_conv2d_grad_weight_kernel(
    grad_y,
    x,
    out,
    target,
    geometry,
    pixels,
    pixels_per_part,
    rows_per_channel,
    stride_y,
    stride_x,
    FINISH: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradient of some rows, all kernel positions, summed over the pixels of one part."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < target[4]
    channel = (row // rows_per_channel).to(tl.int64)
    column = tl.arange(0, COLS)
    begin = tl.program_id(1) * pixels_per_part
    end = tl.minimum(begin + pixels_per_part, pixels)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        image, out_row, out_col = pixel_of(pixel, geometry[2], geometry[3])
        ok = (pixel < end)[:, None] & row_ok[None, :]
        at = image * stride_y[0] + out_row.to(tl.int64) * stride_y[2]
        at += out_col.to(tl.int64) * stride_y[3]
        at = grad_y + at[:, None] + row.to(tl.int64)[None, :] * stride_y[1]
        grad = tl.load(at, mask=ok, other=0.0).to(tl.float32)  # [PIXELS, ROWS]
        top, left = window(geometry, out_row, out_col)
        base = image * stride_x[0] + top.to(tl.int64) * stride_x[2]
        base += left.to(tl.int64) * stride_x[3]
        base = x + base[:, None] + channel[None, :] * stride_x[1]
        for position in range(KH * KW):
            down, right = position // KW * geometry[8], position % KW * geometry[9]
            inside = in_bounds(top + down, left + right, geometry[0], geometry[1])
            at = base + (tl.cast(down, tl.int64) * stride_x[2] + right * stride_x[3])
            tile = tl.load(at, mask=ok & inside[:, None], other=0.0).to(tl.float32)
            sums = tl.sum(grad * tile, axis=0)  # [ROWS]
            acc += tl.where(column[None, :] == position, sums[:, None], 0.0)
    store_grad(out, target, acc, row, 0, FINISH, COLS)
