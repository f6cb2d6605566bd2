"""Masked convolutions, forward and backward."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _grads
from .._layout import conv_memory_format, conv_size
from ._native import isa, scaled_
from ._scratch import decoded
from .aligned import Geometry, aligned_linear
from .depthwise import as_pixels, depthwise, depthwise_grad_weight, depthwise_grad_x, is_depthwise
from .grad import apply_scores, masked_
from .linear import masked_linear, masked_linear_grad_x
from .panels import panel_linear
from .plan import linear_plan, many_pixels
from .product import grad_weight

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Values, words, bias, scale."""
Run = Callable[[Tensor], Tensor]

_MANY_CHANNELS = 16  # worth copying at once
_MOST_KEPT = 1 << 20  # weights, 4 MiB of float32


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
    operands = values, words, bias, scale
    geometry = kernel_size, stride, padding, dilation, groups
    run = _without_library(x, operands, geometry)
    return _by_library(x, operands, geometry)(x) if run is None else run(x)


def bind_masked_conv2d(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    *geometry: Any,
) -> Run:
    """``masked_conv2d`` of tensors like x, the kernel chosen. Where that is the library's, it keeps
    the decoded weight of a prototype, unless it is large: after a convolution has emptied the
    caches, the few instructions that decode it anew take up to 4 % of the next.
    """
    operands = values, words, bias, scale
    run = _without_library(x, operands, geometry)
    if run is not None:
        return run
    sources = [t for t in (values, scale) if t is not None]
    count = words.shape[0] * x.shape[1] // geometry[4] * math.prod(geometry[0])
    # A dense weight may be trained, and through ``data``, where no version would tell.
    is_kept = values.numel() < count <= _MOST_KEPT
    if not is_kept or any(t.is_inference() for t in sources):  # those have no version at all
        return lambda x: _by_library(x, operands, geometry)(x)
    kept: tuple[list[int], Run] | None = None

    def by_kept(x: Tensor) -> Tensor:
        nonlocal kept
        versions = [t._version for t in sources]
        if kept is None or kept[0] != versions:
            kept = versions, _by_library(x, operands, geometry, keeps=True)
        return kept[1](x)

    return by_kept


def _without_library(x: Tensor, operands: Operands, geometry: tuple[Any, ...]) -> Run | None:
    """``masked_conv2d`` by a kernel of ours; None where the library's convolution is faster, or can
    do what no product of ours can.
    """
    values, words, bias, scale = operands
    kernel_size, stride, padding, dilation, groups = geometry
    rows, period = words.shape[0], values.numel()
    is_pointwise = _is_pointwise(x, kernel_size, stride, padding, groups)
    if is_pointwise and not _is_for_library(x, rows, period):

        def pointwise(x: Tensor) -> Tensor:
            y = masked_linear(_as_tokens(x), values, words, bias, scale)
            return _as_image(y, x).contiguous(memory_format=torch.channels_last)

        return pointwise
    if is_depthwise(x, (rows, x.shape[1] // groups, *kernel_size), stride, dilation, groups):
        return lambda x: depthwise(x, values, words, bias, scale, kernel_size, padding)
    flat = [*kernel_size, *stride, *padding, *dilation]
    multiply = _product(x, values, words, flat, groups)
    if multiply is None:
        return None
    height, width = out_size(x.shape[2:], flat)

    def of_patches(x: Tensor) -> Tensor:
        tokens = multiply(as_pixels(x), values, words, bias, scale, flat)
        return tokens.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)

    return of_patches


def _by_library(
    x: Tensor, operands: Operands, geometry: tuple[Any, ...], keeps: bool = False
) -> Run:
    """The library's convolution with the weight decoded: for one call, or to keep."""
    values, words, bias, scale = operands
    kernel_size, *rest = geometry
    memory_format = conv_memory_format(x)
    weight = _conv_weight(x, values, words, scale, x.shape[1] // geometry[4], kernel_size)
    if keeps:
        weight = weight.clone()
    return lambda x: F.conv2d(x, weight, bias, *rest).contiguous(memory_format=memory_format)


def _product(
    x: Tensor, values: Tensor, words: Tensor, geometry: Geometry, groups: int
) -> Callable[..., Tensor] | None:
    """What multiplies the patches of an image; None for the library's convolution."""
    if (
        conv_memory_format(x) != torch.channels_last
        or groups != 1
        or not x.dtype == values.dtype == torch.float32
    ):
        return None
    size = (x.shape[0], *x.shape[2:], x.shape[1])
    if is_aligned_conv2d(size, words.shape[0], values.numel(), geometry, groups, x.dtype):
        return aligned_linear
    pixels = x.shape[0] * math.prod(out_size(x.shape[2:], geometry))
    return panel_linear if pixels < many_pixels(isa()) else None


def is_aligned_conv2d(
    size: Sequence[int],  # of the pixels [B, H, W, C]
    rows: int,
    period: int,
    geometry: Geometry,
    groups: int,
    dtype: torch.dtype,
) -> bool:
    """Whether the bits of an aligned prototype are best multiplied with the patches of an image."""
    batch, height, width, channels = size
    taps = geometry[0] * geometry[1]
    if groups != 1 or dtype != torch.float32 or (taps > 1 and channels < _MANY_CHANNELS):
        return False
    tokens = batch * math.prod(out_size((height, width), geometry))
    return linear_plan(tokens, rows, channels * taps, period, dtype, isa()) == "aligned"


def out_size(size: Sequence[int], geometry: Geometry) -> list[int]:
    """The height and width of a convolution's outputs."""
    return [*map(conv_size, size, *(geometry[i : i + 2] for i in range(0, 8, 2)))]


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
    if _is_pointwise(grad_y, kernel_size, stride, padding, groups):
        grad_tokens = masked_linear_grad_x(_as_tokens(grad_y), values, words, scale, x.shape[1])
        return _as_image(grad_tokens, grad_y).contiguous(memory_format=torch.channels_last)
    size = (words.shape[0], x.shape[1] // groups, *kernel_size)
    can_turn = all(p < k for p, k in zip(padding, kernel_size, strict=True))
    if can_turn and is_depthwise(grad_y, size, stride, dilation, groups):
        return depthwise_grad_x(grad_y, values, words, scale, kernel_size, padding)
    weight = _conv_weight(grad_y, values, words, scale, x.shape[1] // groups, kernel_size)
    memory_format = conv_memory_format(grad_y)
    # Of x the size and layout count: in another than grad_y's the library is ten times slower.
    if x.dtype != grad_y.dtype or not x.is_contiguous(memory_format=memory_format):
        x = torch.empty(x.shape, dtype=grad_y.dtype, memory_format=memory_format)
    geometry = stride, padding, dilation, groups
    grad_x, _ = _library_grads(grad_y, x, weight, geometry, (True, False))
    return grad_x.contiguous(memory_format=memory_format)


def masked_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = (grad_y.shape[1], x.shape[1] // groups, *kernel_size)
    grad = _conv_grad_weight(grad_y, x, size, stride, padding, dilation, groups)
    return masked_(scaled_(grad, scale), words)


def scored_conv2d_grad_scores(
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    scores: Tensor,
    scale: Tensor | None,
    absolute: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = tuple(scores.shape)
    grad = _conv_grad_weight(grad_y, x, size, stride, padding, dilation, groups)
    return apply_scores(grad, values, scores, scale, absolute)


_one_by_one = functools.partial(
    _grads.scored_conv2d_grads, masked_conv2d_grad_x, scored_conv2d_grad_scores
)


def scored_conv2d_grads(
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    scores: Tensor,
    scale: Tensor | None,
    absolute: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    """Where both are the library's, by one call."""
    stride, padding, dilation, groups = geometry
    size, memory_format = tuple(scores.shape), conv_memory_format(grad_y)
    if (
        x.dtype != grad_y.dtype
        or not x.is_contiguous(memory_format=memory_format)
        or _is_pointwise(grad_y, size[2:], stride, padding, groups)
        or is_depthwise(grad_y, size, stride, dilation, groups)
    ):
        return _one_by_one(grad_y, x, values, words, scores, scale, absolute, *geometry)
    weight = _conv_weight(grad_y, values, words, scale, size[1], list(size[2:]))
    grad_x, grad = _library_grads(grad_y, x, weight, geometry, (True, True))
    return (
        grad_x.contiguous(memory_format=memory_format),
        apply_scores(grad.contiguous().view(size), values, scores, scale, absolute),
    )


def _is_pointwise(
    x: Tensor, kernel_size: Sequence[int], stride: list[int], padding: list[int], groups: int
) -> bool:
    """Whether the convolution is a linear layer over the pixels of a channels_last image."""
    return (
        conv_memory_format(x) == torch.channels_last
        and groups == 1
        and list(kernel_size) == [1, 1]
        and list(stride) == [1, 1]
        and list(padding) == [0, 0]
    )


def _is_for_library(x: Tensor, outputs: int, period: int) -> bool:
    """Whether the library's convolution serves a pointwise one best: of many pixels that no kernel
    of ours multiplies, it makes the product faster than the library's matrix product does.
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    return (
        pixels >= many_pixels(isa())
        and x.dtype == torch.float32
        and linear_plan(pixels, outputs, channels, period, x.dtype, isa()) == "panels"
    )


def _as_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` channels_last as ``[B * H * W, C]``."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """``[B * H * W, C]`` as channels_last with the pixels of ``like``."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _conv_weight(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    channels: int,
    kernel_size: list[int],
) -> Tensor:
    """``[N, channels, kh, kw]`` in the memory format of the image x: the library would bring it
    into that with each call, for ten times what decoding takes.
    """
    kh, kw = kernel_size
    if conv_memory_format(x) == torch.channels_last:
        weight = decoded(values, words, channels * kh * kw, taps=kh * kw)
        return scaled_(weight, scale).view(-1, kh, kw, channels).permute(0, 3, 1, 2)
    return scaled_(decoded(values, words, channels * kh * kw), scale).view(-1, channels, kh, kw)


def _conv_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    size: tuple[int, ...],  # [N, C / groups, kh, kw]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of the effective weight, contiguous."""
    if _is_pointwise(x, size[2:], stride, padding, groups):
        return grad_weight(_as_tokens(grad_y), _as_tokens(x)).view(size)
    if is_depthwise(x, size, stride, dilation, groups):
        return depthwise_grad_weight(grad_y, x, size[2], padding).view(size)
    weight = grad_y.new_empty(1).expand(size)  # of which only the size counts
    geometry = stride, padding, dilation, groups
    _, grad = _library_grads(grad_y, x, weight, geometry, (False, True))
    return grad.contiguous().view(size)  # the strides of sizes of 1 too, which DDP looks at


def _library_grads(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[Any, ...],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, those that are wanted."""
    stride, padding, dilation, groups = geometry
    of_conv = stride, padding, dilation, False, [0, 0], groups
    grads = torch.ops.aten.convolution_backward.default(
        grad_y, x, weight, None, *of_conv, [*wanted, False]
    )
    return grads[0], grads[1]
