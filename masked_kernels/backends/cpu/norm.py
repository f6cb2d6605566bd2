"""GELU and BatchNorm in one, on float32 pixels of adjacent channels; other layouts are copied in
and out.
"""

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
    y = native().gelu_batch_norm(
        _channels_last(x),
        stats.contiguous(),
        _contiguous(weight),
        _contiguous(bias),
        None if residual is None else _channels_last(residual),
        eps,
    )
    return _in_layout_of(x, y)


def gelu_batch_norm_grad_affine(grad_y: Tensor, x: Tensor, stats: Tensor, eps: float) -> Tensor:
    grads: Tensor = native().gelu_batch_norm_grad_affine(
        _channels_last(grad_y), _channels_last(x), stats.contiguous(), eps
    )
    return grads


def gelu_batch_norm_grad_x(
    grad_y: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    grad_affine: Tensor | None,
    eps: float,
) -> Tensor:
    grad_x = native().gelu_batch_norm_grad_x(
        _channels_last(grad_y),
        _channels_last(x),
        stats.contiguous(),
        _contiguous(weight),
        _contiguous(grad_affine),
        eps,
    )
    return _in_layout_of(x, grad_x)


def _channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _in_layout_of(x: Tensor, image: Tensor) -> Tensor:
    return image.contiguous(memory_format=conv_memory_format(x))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
