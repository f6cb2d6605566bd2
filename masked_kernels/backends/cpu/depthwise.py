"""Depthwise convolutions of channels_last images with stride 1, forward and backward."""

import functools

import torch
from torch import Tensor

from .._layout import conv_memory_format
from ._native import as_float, native
from ._scratch import decoded

_SIDES = (3, 5, 7, 9)  # of the filters that the kernels are made for


def is_depthwise(
    x: Tensor,
    size: tuple[int, ...],  # [N, C / groups, kh, kw]
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> bool:
    """Whether each channel has a filter of its own that the kernels serve."""
    return (
        conv_memory_format(x) == torch.channels_last
        and x.dtype == torch.float32
        and groups == x.shape[1] == size[0]
        and size[2] == size[3]
        and size[2] in _SIDES
        and list(stride) == list(dilation) == [1, 1]
    )


def depthwise(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    kernel_size: list[int],
    padding: list[int],
) -> Tensor:
    pixels = as_pixels(x)
    spatial = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, kernel_size, strict=True))
    y = pixels.new_empty((x.shape[0], *spatial, x.shape[1]))
    affine = _unchanged(x.shape[1])
    if bias is not None or scale is not None:
        affine = affine.clone()
        affine[0] = 1 if scale is None else scale
        affine[1] = 0 if bias is None else bias
    depthwise_fused_(y, pixels, values, words, affine, "identity", None, kernel_size, padding)
    return y.permute(0, 3, 1, 2)


def depthwise_grad_x(
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    padding: list[int],
) -> Tensor:
    """The convolution of grad_y with the filters turned around; padding is less than the kernel."""
    turned = decoded(values, words, kernel_size[0] * kernel_size[1]).flip(1)
    around = [k - 1 - p for k, p in zip(kernel_size, padding, strict=True)]
    return depthwise(grad_y, turned, _all_kept(*turned.shape), None, scale, kernel_size, around)


def depthwise_grad_weight(grad_y: Tensor, x: Tensor, kernel: int, padding: list[int]) -> Tensor:
    """``[C, kernel * kernel]``."""
    grad: Tensor = native().depthwise_grad(as_pixels(grad_y), as_pixels(x), kernel, *padding)
    return grad


def depthwise_fused_(
    y: Tensor,  # [B, H', W', C]
    x: Tensor,  # [B, H, W, C]
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,  # of y's shape
    kernel_size: list[int],
    padding: list[int],
) -> None:
    native().depthwise_fused_(
        y,
        x,
        as_float(values),
        words.contiguous(),
        *kernel_size,
        *padding,
        affine,
        activation,
        residual,
    )


def as_pixels(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` of any layout as contiguous ``[B, H, W, C]``."""
    pixels = image.permute(0, 2, 3, 1)
    return pixels if pixels.is_contiguous() else pixels.contiguous()


@functools.lru_cache(maxsize=64)
def _unchanged(channels: int) -> Tensor:
    """Gains and shifts ``[4, channels]`` of an epilogue that does nothing."""
    with torch.inference_mode(False):
        return torch.tensor([[1.0], [0.0], [1.0], [0.0]], device="cpu").repeat(1, channels)


@functools.lru_cache(maxsize=64)
def _all_kept(rows: int, cols: int) -> Tensor:
    """The words of a mask of ones."""
    with torch.inference_mode(False):
        words: Tensor = native().pack(torch.ones(rows, cols, dtype=torch.bool, device="cpu"))
        return words
