"""Convolution, norms, activation and residual as one op, for inference."""

import itertools
from typing import Any

import torch
from torch import Tensor

from ._native import native
from .aligned import Geometry, aligned_linear_fused_
from .conv2d import is_aligned_conv2d, masked_conv2d, out_size
from .depthwise import as_pixels, depthwise_fused_
from .linear import masked_linear
from .plan import row_patterns


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
    if groups == 1 and [*stride, *padding, *dilation] == [*kernel_size, 0, 0, 1, 1]:
        products = masked_linear(_as_patches(x, kernel_size), values, words, None, None)
    else:
        image = masked_conv2d(x.permute(0, 3, 1, 2), values, words, None, None, *geometry)
        products = image.permute(0, 2, 3, 1)
    y.copy_(products.reshape(y.shape))
    flat_y = y.view(y.shape[:3].numel(), outputs)
    native().finish_(
        flat_y, affine, activation, None if residual is None else residual.view(flat_y.shape)
    )


def is_fused_depthwise(channels: int, rows: int, geometry: Geometry, groups: int) -> bool:
    """Whether the depthwise kernel serves a convolution of pixels."""
    stride_and_dilation = [*geometry[2:4], *geometry[6:8]]
    return groups == channels == rows and stride_and_dilation == [1, 1, 1, 1]


def _as_patches(x: Tensor, size: list[int]) -> Tensor:
    """``[B, H, W, C]`` as ``[patches, C * kh * kw]``; a rest is left out."""
    batch, height, width, channels = x.shape
    (kh, kw), (rows, cols) = size, (height // size[0], width // size[1])
    x = x[:, : rows * kh, : cols * kw]
    patches = x.reshape(batch, rows, kh, cols, kw, channels).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch * rows * cols, channels * kh * kw)
