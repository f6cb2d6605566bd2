"""Convolutions with one channel a group: sums of products of pixels, without tensor cores.

Masked filters are decoded once, float32 and by the kernel position, where a program that loads them
needs no bits. The convolution itself works on *strips*: some output pixels side by side, in one row
or in two, a sum each, so that an input pixel is loaded once for all of them. Row n of the weight
reads channel ``n // rows_per_channel``.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._conv import Geometry, image_at, pixel_of, window, window_back
from ._helpers import load_weight, on_device, row_starts, weight_arguments
from ._strips import below, beside, load_pixels, strip_of, widens_in_assembly, zeros
from .output import Output, finished

_FILTERS = 16  # that a program decodes, and a divisor of the rows of every tile


def depthwise_conv2d(
    y: Tensor, x: Tensor, values: Tensor, words: Tensor, output: Output, geometry: Geometry
) -> None:
    """Fill ``y``."""
    _convolve(y, x, values, words, output, geometry, turned=False)


def depthwise_conv2d_grad_x(
    grad_x: Tensor,
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    geometry: Geometry,
) -> None:
    """Fill ``grad_x``."""
    if geometry.stride == (1, 1) and words.shape[0] == geometry.channels:
        turned = _turned(geometry)
        _convolve(grad_x, grad_y, values, words, Output(scale=scale), turned, turned=True)
    else:
        _gather_grad_x(grad_x, grad_y, values, words, scale, geometry)


def _turned(geometry: Geometry) -> Geometry:
    """The convolution of grad_y with turned filters that gives grad_x, where the stride is 1. Its
    padding may be negative.
    """
    spans = zip(geometry.kernel, geometry.dilation, geometry.padding, strict=True)
    height, width = ((kernel - 1) * dilation - padding for kernel, dilation, padding in spans)
    return dataclasses.replace(geometry, size=geometry.out_size, padding=(height, width))


def _convolve(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    output: Output,
    geometry: Geometry,
    turned: bool,
) -> None:
    rows = words.shape[0]
    height, width = geometry.out_size
    adjacent = geometry.stride[0] == geometry.dilation[0] == 1
    tile = config.strips_tile(rows, (height, width), geometry.kernel, x.stride(1) == 1, adjacent)
    strips = geometry.batch * config.cdiv(height, tile.down) * config.cdiv(width, tile.strip)
    grid = (config.cdiv(strips, tile.strips) * config.cdiv(rows, tile.rows),)
    with on_device(x):
        _depthwise_conv2d_kernel[grid](
            x,
            _filters(values, words, geometry.cols, tile.rows, turned),
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
            *geometry.dilation,
            tile.down,
            tile.strip,
            tile.strips,
            tile.rows,
            widens_in_assembly(x),
            num_warps=tile.warps,
        )


def _filters(values: Tensor, words: Tensor, cols: int, block: int, turned: bool = False) -> Tensor:
    """The masked weight ``[rows, cols]`` as float32 ``[blocks of rows, cols, block]``, with zeros
    past the last row; turned, its columns in reverse.
    """
    rows = words.shape[0]
    blocks = config.cdiv(rows, block)
    filters = values.new_empty((blocks, cols, block), dtype=torch.float32)
    _filters_kernel[(blocks * block // _FILTERS,)](
        weight_arguments(values, words, cols, cols),
        filters,
        rows,
        block,
        turned,
        _FILTERS,
        max(32, config.next_power_of_2(cols)),
    )
    return filters


def _gather_grad_x(
    grad_x: Tensor,
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    geometry: Geometry,
) -> None:
    channels = geometry.channels
    tile = config.depthwise_tile(geometry.in_pixels, channels)
    grid = (config.cdiv(geometry.in_pixels, tile.pixels) * config.cdiv(channels, tile.rows),)
    with on_device(grad_y):
        _depthwise_conv2d_grad_x_kernel[grid](
            grad_y,
            _filters(values, words, geometry.cols, _FILTERS),
            scale,
            grad_x,
            geometry.arguments(),
            geometry.in_pixels,
            channels,
            words.shape[0] // channels,
            grad_y.stride(),
            grad_x.stride(),
            *geometry.kernel,
            _FILTERS,
            tile.pixels,
            tile.rows,
        )


@triton.jit
def _filters_kernel(
    weight, filters, rows, block, TURNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    starts = row_starts(row, 0, weight[2], weight[4])
    tile = load_weight(weight, row, row < rows, starts, 0, COLS)
    position = weight[2] - 1 - col if TURNED else col
    at = filters + (row // block * (weight[2] * block) + row % block).to(tl.int64)[:, None]
    at += position[None, :] * block
    tl.store(at, tile.to(tl.float32), mask=(col < weight[2])[None, :])


@triton.jit
def _load_filters(filters, r, KW: tl.constexpr):
    """Row r of some filters, float32; ``filters`` points to their first weights."""
    w = ()
    for s in tl.static_range(KW):
        w += (tl.load(filters + (r * KW + s) * filters.shape[0])[None, :],)
    return w


@triton.jit
def _add_products(
    sums,
    tiles,
    w,
    ROW: tl.constexpr,
    STRIP: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
):
    """Sums with the products of one row of the filters, for the pixels in output row ROW."""
    new = ()
    for n in tl.static_range(len(sums)):
        total = sums[n]
        if n // STRIP == ROW:
            for s in tl.static_range(len(w)):
                total += tiles[n % STRIP * STRIDE + s * DILATION] * w[s]
        new += (total,)
    return new


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
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    DOWN: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Some rows of some strips. More than one row of output, DOWN, takes a stride and a dilation of
    1 from row to row.
    """
    COLUMNS: tl.constexpr = (STRIP - 1) * STRIDE_W + (KW - 1) * DILATION_W + 1
    across = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    strip = tl.program_id(0) // across * STRIPS + tl.arange(0, STRIPS)
    ok = (strip < strips)[:, None] & row_ok[None, :]
    image, out_row, out_col = strip_of(strip, geometry, DOWN, STRIP)
    top, left = window(geometry, out_row, out_col)
    pixel = x + image_at(stride_x, image, top, left, row // rows_per_channel)
    filters += (tl.program_id(0) % across).to(tl.int64) * (KH * KW * ROWS) + tl.arange(0, ROWS)
    sums = zeros(DOWN * STRIP, STRIPS, ROWS)
    # Between input rows that only some output rows read lie those that all of them read.
    for early in tl.static_range(DOWN - 1):
        inside = ok & below(top + early, geometry[0])[:, None]
        tiles = load_pixels(pixel, stride_x, left, geometry[1], inside, early, COLUMNS, ASM)
        for i in tl.static_range(early + 1):
            w = _load_filters(filters, early - i, KW)
            sums = _add_products(sums, tiles, w, i, STRIP, STRIDE_W, DILATION_W)
    for r in range(DOWN - 1, KH):
        inside = ok & below(top + r * DILATION_H, geometry[0])[:, None]
        tiles = load_pixels(
            pixel, stride_x, left, geometry[1], inside, r * DILATION_H, COLUMNS, ASM
        )
        for i in tl.static_range(DOWN):
            w = _load_filters(filters, r - i, KW)
            sums = _add_products(sums, tiles, w, i, STRIP, STRIDE_W, DILATION_W)
    for past in tl.static_range(KH, KH + DOWN - 1):
        inside = ok & below(top + past, geometry[0])[:, None]
        tiles = load_pixels(pixel, stride_x, left, geometry[1], inside, past, COLUMNS, ASM)
        for i in tl.static_range(past - KH + 1, DOWN):
            w = _load_filters(filters, past - i, KW)
            sums = _add_products(sums, tiles, w, i, STRIP, STRIDE_W, DILATION_W)
    residual, strides = output[3], output[4:]
    if residual is not None:
        residual += image_at(strides, image, out_row, out_col, row)
    pixel = y + image_at(stride_y, image, out_row, out_col, row)
    for n in tl.static_range(DOWN * STRIP):
        inside = (out_row + n // STRIP < geometry[2]) & (out_col + n % STRIP < geometry[3])
        there = ok & inside[:, None]
        total = finished(sums[n], output, row, row_ok, rows, ACTIVATION, 1)
        if residual is not None:
            at = beside(residual, strides, n // STRIP, n % STRIP)
            total += tl.load(at, mask=there, other=0.0).to(tl.float32)
        at = beside(pixel, stride_y, n // STRIP, n % STRIP)
        tl.store(at, total.to(y.dtype.element_ty), mask=there)


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
    FILTERS: tl.constexpr,
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
            first = row // FILTERS * (KH * KW * FILTERS) + row % FILTERS
            w = tl.load(filters + first + position * FILTERS, mask=channel_ok, other=0.0)
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
