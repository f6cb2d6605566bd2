"""BatchNorm with GELU before it or ReLU after it in one, on float32 pixels of adjacent channels;
other layouts are copied in and out.
"""

from typing import Any

import torch
from torch import Tensor

from .._layout import conv_memory_format
from ._native import native


def gelu_stats(x: Tensor) -> Tensor:
    stats: Tensor = native().gelu_stats(_channels_last(x))
    return stats


def gelu_batch_norm(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    return _normalised(native().gelu_batch_norm, x, stats, weight, bias, residual, eps)


def gelu_batch_norm_grads(
    grad_y: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, of_batch: bool, eps: float
) -> tuple[Tensor, Tensor]:
    images = _channels_last(grad_y), _channels_last(x)
    grad_x, grad_affine = native().gelu_batch_norm_grads(
        *images, stats.contiguous(), _contiguous(weight), of_batch, eps
    )
    return _in_layout_of(x, grad_x), grad_affine


def batch_norm_stats(x: Tensor) -> Tensor:
    stats: Tensor = native().batch_norm_stats(_channels_last(x))
    return stats


def batch_norm_relu(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    return _normalised(native().batch_norm_relu, x, stats, weight, bias, residual, eps)


def batch_norm_relu_grads(
    grad_y: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    is_of_norm: bool,
    of_batch: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    images = _channels_last(grad_y), _channels_last(x)
    vectors = stats.contiguous(), _contiguous(weight), _contiguous(bias)
    grad_x, grad_affine = native().batch_norm_relu_grads(
        *images, *vectors, is_of_norm, of_batch, eps
    )
    return _in_layout_of(x, grad_x), grad_affine


def _normalised(
    run: Any,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    vectors = stats.contiguous(), _contiguous(weight), _contiguous(bias)
    image = None if residual is None else _channels_last(residual)
    return _in_layout_of(x, run(_channels_last(x), *vectors, image, eps))


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _in_layout_of(x: Tensor, image: Tensor) -> Tensor:
    return image.contiguous(memory_format=conv_memory_format(x))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
