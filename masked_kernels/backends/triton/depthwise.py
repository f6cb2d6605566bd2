"""Convolutions with one channel a group: sums of products of pixels, without tensor cores.

One program holds a tile [pixels, rows of the weight]; the masked filter of a row is loaded once a
kernel position and serves all pixels. Row n of the weight reads channel ``n // rows_per_channel``.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._conv import Geometry, in_bounds, pixel_of, window, window_back
from ._helpers import on_device, programs, row_starts, weight_arguments
from .epilogue import WeightGrad, store_grad


def depthwise_conv2d(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
) -> None:
    """Fill ``y``."""
    rows = words.shape[0]
    tile = config.depthwise_tile(geometry.out_pixels, rows)
    grid = (triton.cdiv(geometry.out_pixels, tile.pixels) * triton.cdiv(rows, tile.rows),)
    with on_device(x):
        _depthwise_conv2d_kernel[grid](
            x,
            weight_arguments(values, words, geometry.cols, geometry.cols),
            bias,
            scale,
            y,
            geometry.arguments(),
            geometry.out_pixels,
            rows,
            rows // geometry.channels,
            x.stride(),
            y.stride(),
            *geometry.kernel,
            tile.pixels,
            tile.rows,
        )


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
            weight_arguments(values, words, geometry.cols, geometry.cols),
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
    steps = triton.cdiv(geometry.out_pixels, tile.pixels)
    parts = config.parts(blocks, steps, programs(x))
    destination = target.destination(parts)
    with on_device(x):
        _depthwise_conv2d_grad_weight_kernel[(blocks, parts)](
            grad_y,
            x,
            destination,
            target.arguments(),
            geometry.arguments(),
            geometry.out_pixels,
            triton.cdiv(steps, parts) * tile.pixels,
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
def _load_filter(weight, row, row_ok, starts, position):
    """float32 weights of the rows at one kernel position."""
    values, words, _cols, words_per_row, _period = weight
    at = words + row.to(tl.int64) * words_per_row + position // 32
    bits = (tl.load(at, mask=row_ok, other=0) >> (position % 32)) & 1
    value = tl.load(values + starts + position, mask=row_ok, other=0.0)
    return tl.where(bits != 0, value.to(tl.float32), 0.0)


@triton.jit
def _depthwise_conv2d_kernel(
    x,
    weight,
    bias,
    scale,
    y,
    geometry,
    pixels,
    rows,
    rows_per_channel,
    stride_x,
    stride_y,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    across = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    pixel = tl.program_id(0) // across * PIXELS + tl.arange(0, PIXELS)
    image, out_row, out_col = pixel_of(pixel, geometry[2], geometry[3])
    top, left = window(geometry, out_row, out_col)
    base = image * stride_x[0] + top.to(tl.int64) * stride_x[2] + left.to(tl.int64) * stride_x[3]
    channel = (row // rows_per_channel).to(tl.int64)
    base = x + base[:, None] + channel[None, :] * stride_x[1]  # [PIXELS, ROWS]
    ok = (pixel < pixels)[:, None] & row_ok[None, :]
    starts = row_starts(row, 0, weight[2], weight[4])
    acc = tl.zeros((PIXELS, ROWS), tl.float32)
    for r in range(KH):
        for s in tl.static_range(KW):
            w = _load_filter(weight, row, row_ok, starts, r * KW + s)
            down, right = r * geometry[8], s * geometry[9]
            inside = in_bounds(top + down, left + right, geometry[0], geometry[1])
            at = base + (tl.cast(down, tl.int64) * stride_x[2] + right * stride_x[3])
            tile = tl.load(at, mask=ok & inside[:, None], other=0.0)
            acc += tile.to(tl.float32) * w[None, :]
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    out = image * stride_y[0] + out_row.to(tl.int64) * stride_y[2]
    out += out_col.to(tl.int64) * stride_y[3]
    out = y + out[:, None] + row.to(tl.int64)[None, :] * stride_y[1]
    tl.store(out, acc.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _depthwise_conv2d_grad_x_kernel(
    grad_y,
    weight,
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
            starts = row_starts(row, 0, weight[2], weight[4])
            w = _load_filter(weight, row, channel_ok, starts, position)
            tile = tl.load(
                grad_y + at[:, None] + row.to(tl.int64)[None, :] * stride_y[1],
                mask=ok & there[:, None],
                other=0.0,
            )
            acc += tile.to(tl.float32) * w[None, :]
    if scale is not None:
        acc *= tl.load(scale).to(tl.float32)
    out = image * stride_x[0] + x_row.to(tl.int64) * stride_x[2]
    out += x_col.to(tl.int64) * stride_x[3]
    out = grad_x + out[:, None] + channel.to(tl.int64)[None, :] * stride_x[1]
    tl.store(out, acc.to(grad_x.dtype.element_ty), mask=ok)


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
