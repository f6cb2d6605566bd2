"""Convolution, norms, activation and residual as one op, for inference."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import _fused
from ._native import native
from .aligned import aligned_linear_fused_
from .conv2d import is_aligned_conv2d, masked_conv2d, out_size
from .depthwise import as_pixels, depthwise_fused_
from .linear import masked_linear
from .plan import row_patterns

_SLICE_BYTES = 1 << 20  # of an activation, for each thread: two of them stay in the L2 cache


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
    y = pixels.new_empty(_size(pixels.shape, words, geometry))
    _fused_(y, pixels, (values, words, affine, activation), rest, geometry)
    return y.permute(0, 3, 1, 2)


def masked_conv2d_chain(
    x: Tensor,
    values: list[Tensor],
    words: list[Tensor],
    affines: list[Tensor],
    activations: list[str],
    adds_input: list[bool],
    geometry: list[int],
) -> Tensor:
    """In slices of the batch, to and fro between two buffers that stay in the cache.

    A new result for every step would cost as much as the steps: memory that the system hands out
    anew comes page by page.
    """
    pixels = as_pixels(x)
    steps = list(_fused.steps(values, words, affines, activations, adds_input, geometry))
    sizes = [pixels.shape]
    for operands, _, of_conv in steps:
        sizes.append(_size(sizes[-1], operands[1], of_conv))
    y = pixels.new_empty(sizes[-1])
    largest = max((size[1:].numel() for size in sizes[1:-1]), default=0)
    bytes_of_image = max(largest, 1) * pixels.element_size()
    images = max(torch.get_num_threads() * _SLICE_BYTES // bytes_of_image, 1)
    buffers = pixels.new_empty((2, min(images, len(pixels)) * largest))
    for begin in range(0, len(pixels), images):
        part = pixels[begin : begin + images]
        for i, (operands, adds, of_conv) in enumerate(steps):
            if i + 1 < len(steps):
                size = torch.Size((len(part), *sizes[i + 1][1:]))
                out = buffers[i % 2, : size.numel()].view(size)
            else:
                out = y[begin : begin + images]
            _fused_(out, part, operands, part if adds else None, of_conv)
            part = out
    return y.permute(0, 3, 1, 2)


def _size(size: torch.Size, words: Tensor, geometry: tuple[Any, ...]) -> torch.Size:
    """``[B, H', W', N]`` from ``[B, H, W, C]``."""
    spatial = out_size(size[1:3], [*itertools.chain(*geometry[:4])])
    return torch.Size((size[0], *spatial, words.shape[0]))


def _fused_(
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
    if groups == channels == words.shape[0] and [*stride, *dilation] == [1, 1, 1, 1]:
        depthwise_fused_(y, x, values, words, affine, activation, residual, kernel_size, padding)
        return
    outputs = words.shape[0]
    flat = [*kernel_size, *stride, *padding, *dilation]
    cols = channels * kernel_size[0] * kernel_size[1]
    if row_patterns(cols, values.numel()) == 1 and is_aligned_conv2d(
        x, values, words, flat, groups
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


def _as_patches(x: Tensor, size: list[int]) -> Tensor:
    """``[B, H, W, C]`` as ``[patches, C * kh * kw]``; a rest is left out."""
    batch, height, width, channels = x.shape
    (kh, kw), (rows, cols) = size, (height // size[0], width // size[1])
    x = x[:, : rows * kh, : cols * kw]
    patches = x.reshape(batch, rows, kh, cols, kw, channels).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch * rows * cols, channels * kh * kw)
