"""The gradient of filters with one channel a group: on strips as the convolution itself, with a sum
for each kernel position in registers of its own, so that tiles are reduced once, at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._conv import Geometry, image_at, window
from ._helpers import on_device, programs
from ._strips import below, load_pixels, strip_of, widens_in_assembly, zeros
from .epilogue import WeightGrad


def fill_depthwise_grad(target: WeightGrad, grad_y: Tensor, x: Tensor, geometry: Geometry) -> None:
    """Fill the gradient of the filters."""
    height, width = geometry.out_size
    tile = config.depthwise_grad_tile(
        target.rows, (height, width), geometry.kernel, x.stride(1) == 1
    )
    strips = geometry.batch * config.cdiv(height, tile.down) * config.cdiv(width, tile.strip)
    blocks = config.cdiv(target.rows, tile.rows)
    kernel_blocks = config.cdiv(geometry.kernel[0], tile.kernel_rows)
    steps = config.cdiv(strips, tile.strips)
    parts = config.parts(blocks * kernel_blocks, steps, programs(x) * tile.programs // 2)
    sums = x.new_empty((parts, target.rows, target.cols), dtype=torch.float32)
    with on_device(x):
        _depthwise_conv2d_grad_weight_kernel[(blocks, parts, kernel_blocks)](
            grad_y,
            x,
            sums,
            geometry.arguments(),
            strips,
            config.cdiv(steps, parts) * tile.strips,
            target.rows,
            target.rows // geometry.channels,
            grad_y.stride(),
            x.stride(),
            *geometry.kernel,
            *geometry.stride,
            *geometry.dilation,
            tile.kernel_rows,
            tile.down,
            tile.strip,
            tile.strips,
            tile.rows,
            widens_in_assembly(x),
            num_warps=tile.warps,
        )
        target.add_parts(sums)


@triton.jit
def _add_correlations(
    sums,
    tiles,
    grads,
    ROW: tl.constexpr,
    KERNEL_ROW: tl.constexpr,
    KW: tl.constexpr,
    STRIP: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
):
    """Sums of kernel positions with the products of output row ROW, for those in KERNEL_ROW."""
    new = ()
    for n in tl.static_range(len(sums)):
        total = sums[n]
        if n // KW == KERNEL_ROW:
            for j in tl.static_range(STRIP):
                total += tiles[j * STRIDE + n % KW * DILATION] * grads[ROW * STRIP + j]
        new += (total,)
    return new


@triton.jit
def _depthwise_conv2d_grad_weight_kernel(
    grad_y,
    x,
    out,
    geometry,
    strips,
    strips_per_part,
    rows,
    rows_per_channel,
    stride_y,
    stride_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    DOWN: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    ROWS: tl.constexpr,
    ASM: tl.constexpr,
):
    """The gradient of some rows at KERNEL_ROWS rows of the kernel, summed over a part of the
    strips.
    """
    COLUMNS: tl.constexpr = (STRIP - 1) * STRIDE_W + (KW - 1) * DILATION_W + 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    first = tl.program_id(2) * KERNEL_ROWS
    begin = tl.program_id(1) * strips_per_part
    end = tl.minimum(begin + strips_per_part, strips)
    sums = zeros(KERNEL_ROWS * KW, STRIPS, ROWS)
    for start in range(begin, end, STRIPS):
        strip = start + tl.arange(0, STRIPS)
        ok = (strip < end)[:, None] & row_ok[None, :]
        image, out_row, out_col = strip_of(strip, geometry, DOWN, STRIP)
        top, left = window(geometry, out_row, out_col)
        top += first * DILATION_H
        grad_pixel = grad_y + image_at(stride_y, image, out_row, out_col, row)
        pixel = x + image_at(stride_x, image, top, left, row // rows_per_channel)
        grads = ()
        for i in tl.static_range(DOWN):
            inside = ok & (out_row + i < geometry[2])[:, None]
            grads += load_pixels(grad_pixel, stride_y, out_col, geometry[3], inside, i, STRIP, ASM)
        for down in tl.static_range((DOWN - 1) * STRIDE_H + (KERNEL_ROWS - 1) * DILATION_H + 1):
            inside = ok & below(top + down, geometry[0])[:, None]
            tiles = load_pixels(pixel, stride_x, left, geometry[1], inside, down, COLUMNS, ASM)
            for i in tl.static_range(DOWN):
                for r in tl.static_range(KERNEL_ROWS):
                    if i * STRIDE_H + r * DILATION_H == down:
                        sums = _add_correlations(
                            sums, tiles, grads, i, r, KW, STRIP, STRIDE_W, DILATION_W
                        )
    out += (tl.program_id(1).to(tl.int64) * rows + row) * (KH * KW)
    for n in tl.static_range(KERNEL_ROWS * KW):
        position = first * KW + n
        if position < KH * KW:
            tl.store(out + position, tl.sum(sums[n], axis=0), mask=row_ok)
