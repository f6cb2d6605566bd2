"""Convolution, norms, activation and residual as one op, for inference."""

import itertools
from typing import Any

import torch
from torch import Tensor

from ._native import native
from .aligned import Geometry, aligned_linear_fused_
from .conv2d import MANY_PIXELS, is_aligned_conv2d, masked_conv2d, out_size
from .depthwise import as_pixels, depthwise_fused_
from .panels import panel_linear_fused_
from .plan import row_patterns

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
    channels = x.shape[3]
    flat = [*kernel_size, *stride, *padding, *dilation]
    if is_fused_depthwise(channels, words.shape[0], flat, groups):
        depthwise_fused_(y, x, values, words, affine, activation, residual, kernel_size, padding)
        return
    outputs = words.shape[0]
    cols = channels * kernel_size[0] * kernel_size[1]
    period = values.numel()
    if row_patterns(cols, period) == 1 and is_aligned_conv2d(
        x.shape, outputs, period, flat, groups, x.dtype
    ):
        aligned_linear_fused_(y, x, values, words, affine, activation, residual, flat)
        return
    if is_by_panels(outputs, cols, y.shape[:3].numel(), groups):
        panel_linear_fused_(y, x, values, words, affine, activation, residual, flat)
        return
    image = masked_conv2d(x.permute(0, 3, 1, 2), values, words, None, None, *geometry)
    y.copy_(image.permute(0, 2, 3, 1))
    flat_y = y.view(y.shape[:3].numel(), outputs)
    native().finish_(
        flat_y, affine, activation, None if residual is None else residual.view(flat_y.shape)
    )


def is_fused_depthwise(channels: int, rows: int, geometry: Geometry, groups: int) -> bool:
    """Whether the depthwise kernel serves a convolution of pixels."""
    stride_and_dilation = [*geometry[2:4], *geometry[6:8]]
    return groups == channels == rows and stride_and_dilation == [1, 1, 1, 1]


def is_by_panels(rows: int, cols: int, pixels: int, groups: int) -> bool:
    """Whether a weight ``[rows, cols]`` is best multiplied with patches by our own product: where
    the library's convolution must wait for a weight that serves few pixels, or has little to gain.
    """
    if groups != 1 or cols == 0:
        return False
    return pixels < MANY_PIXELS or (cols <= _FEW_COLUMNS and rows >= _MANY_ROWS)
