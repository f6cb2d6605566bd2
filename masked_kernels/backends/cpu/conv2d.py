"""Masked convolutions, forward and backward."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .._layout import conv_memory_format
from ._native import as_float, isa, native, scaled_
from .aligned import aligned_linear_fused
from .bits import decode
from .grad import apply_scores, masked_
from .linear import masked_linear, masked_linear_grad_x
from .plan import linear_plan, row_patterns

_DEPTHWISE_KERNELS = (3, 5, 7, 9)  # that depthwise_grad serves


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
    memory_format = conv_memory_format(x)
    if _is_pointwise(x, kernel_size, stride, padding, groups):
        y = masked_linear(_as_tokens(x), values, words, bias, scale)
        return _as_image(y, x).contiguous(memory_format=torch.channels_last)
    weight = _conv_weight(values, words, scale, x.shape[1] // groups, kernel_size)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=memory_format)


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
    pixels = _as_pixels(x)
    rest = None if residual is None else _as_pixels(residual)
    affine = affine.contiguous()
    if groups == x.shape[1] == words.shape[0] and [*stride, *dilation] == [1, 1, 1, 1]:
        y: Tensor = native().depthwise_fused(
            pixels,
            as_float(values),
            words.contiguous(),
            *kernel_size,
            *padding,
            affine,
            activation,
            rest,
        )
        return y.permute(0, 3, 1, 2)
    if groups == 1 and [*kernel_size, *stride, *padding] == [1, 1, 1, 1, 0, 0]:
        batch, height, width, channels = pixels.shape
        rows, tokens = words.shape[0], batch * height * width
        plan = linear_plan(tokens, rows, channels, values.numel(), x.dtype, isa())
        if plan == "aligned" and row_patterns(channels, values.numel()) == 1:
            y = aligned_linear_fused(pixels, values, words, affine, activation, rest)
        else:
            y = masked_linear(pixels.view(tokens, channels), values, words, None, None)
            _finish_(y, affine, activation, rest)
            y = y.view(batch, height, width, rows)
        return y.permute(0, 3, 1, 2)
    if groups == 1 and [*stride, *padding, *dilation] == [*kernel_size, 0, 0, 1, 1]:
        patches = _as_patches(x, kernel_size)
        batch, height, width, _ = patches.shape
        y = masked_linear(patches.flatten(0, 2), values, words, None, None)
        _finish_(y, affine, activation, rest)
        return y.view(batch, height, width, words.shape[0]).permute(0, 3, 1, 2)
    image = masked_conv2d(
        pixels.permute(0, 3, 1, 2),
        values,
        words,
        None,
        None,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
    )
    out = _as_pixels(image)
    _finish_(out.flatten(0, 2), affine, activation, rest)
    return out.permute(0, 3, 1, 2)


def masked_conv2d_grad_x(
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    x_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if _is_pointwise(grad_y, kernel_size, stride, padding, groups):
        grad_tokens = masked_linear_grad_x(_as_tokens(grad_y), values, words, scale, x_size[1])
        return _as_image(grad_tokens, grad_y).contiguous(memory_format=torch.channels_last)
    weight = _conv_weight(values, words, scale, x_size[1] // groups, kernel_size)
    memory_format = conv_memory_format(grad_y)
    # Only the size and layout of x matter; conv2d_input passes one of no layout, and is ten times
    # slower on channels_last.
    x = torch.empty(x_size, dtype=grad_y.dtype, memory_format=memory_format)
    grad_x: Tensor = torch.ops.aten.convolution_backward(
        grad_y,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]
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


def _as_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` channels_last as ``[B * H * W, C]``."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _finish_(tokens: Tensor, affine: Tensor, activation: str, residual: Tensor | None) -> None:
    rest = None if residual is None else residual.view(tokens.shape)
    native().finish_(tokens, affine, activation, rest)


def _as_pixels(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` of any layout as contiguous ``[B, H, W, C]``."""
    pixels = image.permute(0, 2, 3, 1)
    return pixels if pixels.is_contiguous() else pixels.contiguous()


def _as_patches(image: Tensor, size: list[int]) -> Tensor:
    """``[B, C, H, W]`` as contiguous ``[B, H / kh, W / kw, C * kh * kw]``; a rest is left out."""
    batch, channels, height, width = image.shape
    (kh, kw), (rows, cols) = size, (height // size[0], width // size[1])
    image = image[:, :, : rows * kh, : cols * kw]
    patches = image.reshape(batch, channels, rows, kh, cols, kw).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows, cols, channels * kh * kw)


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """``[B * H * W, C]`` as channels_last with the pixels of ``like``."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _conv_weight(
    values: Tensor, words: Tensor, scale: Tensor | None, channels: int, kernel_size: list[int]
) -> Tensor:
    kh, kw = kernel_size
    weight = decode(values, words, channels * kh * kw)
    return scaled_(weight, scale).view(-1, channels, kh, kw)


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
        return (_as_tokens(grad_y).t() @ _as_tokens(x)).view(size)
    if (
        conv_memory_format(x) == torch.channels_last
        and x.dtype == torch.float32
        and groups == x.shape[1] == size[0]
        and size[2] == size[3]
        and size[2] in _DEPTHWISE_KERNELS
        and list(stride) == list(dilation) == [1, 1]
    ):
        pixels = (t.permute(0, 2, 3, 1).contiguous() for t in (grad_y, x))
        grad: Tensor = native().depthwise_grad(*pixels, size[2], *padding)
        return grad.view(size)
    grad = conv2d_weight(x, size, grad_y, stride, padding, dilation, groups)
    return grad.contiguous()
