"""Convolution, norms, activation and residual as one op, for inference."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._native import isa, native
from .aligned import Geometry, aligned_linear_fused_
from .conv2d import is_aligned_conv2d, masked_conv2d, out_size
from .depthwise import as_pixels, depthwise_fused_
from .panels import panel_linear_fused_
from .plan import many_pixels, row_patterns

Kernel = Literal["depthwise", "aligned", "panels"]

_FEW_COLUMNS = 1024  # up to 576 it beats the library, at 768 it is as fast
_MANY_ROWS = 32  # 16 do not repay copying a patch


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
    pixels = as_pixels(x)
    rest = None if residual is None else as_pixels(residual)
    geometry = (kernel_size, stride, padding, dilation, groups)
    y = pixels.new_empty(pixels_size(pixels.shape, words, geometry))
    fused_(y, pixels, (values, words, affine, activation), rest, geometry)
    return y.permute(0, 3, 1, 2)


def pixels_size(size: torch.Size, words: Tensor, geometry: tuple[Any, ...]) -> torch.Size:
    """``[B, H', W', N]`` from ``[B, H, W, C]``."""
    spatial = out_size(size[1:3], [*itertools.chain(*geometry[:4])])
    return torch.Size((size[0], *spatial, words.shape[0]))


def fused_(
    y: Tensor,  # [B, H', W', N]
    x: Tensor,  # [B, H, W, C]
    operands: tuple[Tensor, Tensor, Tensor, str],
    residual: Tensor | None,  # of y's shape
    geometry: tuple[Any, ...],
) -> None:
    values, words, affine, activation = operands
    kernel_size, stride, padding, dilation, groups = geometry
    affine = affine.contiguous()
    flat = [*kernel_size, *stride, *padding, *dilation]
    outputs = words.shape[0]
    kernel = kernel_of(x.shape, outputs, values.numel(), flat, groups)
    if kernel == "depthwise":
        depthwise_fused_(y, x, values, words, affine, activation, residual, kernel_size, padding)
        return
    if kernel is not None:
        multiply = aligned_linear_fused_ if kernel == "aligned" else panel_linear_fused_
        multiply(y, x, values, words, affine, activation, residual, flat)
        return
    image = masked_conv2d(x.permute(0, 3, 1, 2), values, words, None, None, *geometry)
    y.copy_(image.permute(0, 2, 3, 1))
    flat_y = y.view(y.shape[:3].numel(), outputs)
    native().finish_(
        flat_y, affine, activation, None if residual is None else residual.view(flat_y.shape)
    )


def kernel_of(
    size: Sequence[int],  # of the pixels [B, H, W, C]
    rows: int,
    period: int,
    geometry: Geometry,
    groups: int,
) -> Kernel | None:
    """The kernel that serves a convolution with all that follows; None for the library's."""
    batch, *spatial, channels = size
    cols = channels * geometry[0] * geometry[1]
    if groups == channels == rows and [*geometry[2:4], *geometry[6:8]] == [1, 1, 1, 1]:
        return "depthwise"
    if groups != 1 or cols == 0:
        return None
    if row_patterns(cols, period) == 1 and is_aligned_conv2d(
        size, rows, period, geometry, groups, torch.float32
    ):
        return "aligned"
    # Where the library's convolution must wait for a weight that serves few pixels, or has little
    # to gain.
    pixels = batch * math.prod(out_size(spatial, geometry))
    by_panels = pixels < many_pixels(isa()) or (cols <= _FEW_COLUMNS and rows >= _MANY_ROWS)
    return "panels" if by_panels else None
