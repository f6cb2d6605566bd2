"""GELU and BatchNorm in one.

The kernels read float32 pixels of adjacent channels; other layouts are copied in and out.
"""

from torch import Tensor

from .._layout import conv_memory_format
from ._native import native


def gelu_stats(x: Tensor) -> Tensor:
    stats: Tensor = native().gelu_stats(_pixels(x))
    return stats


def gelu_batch_norm(
    x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _image(native().gelu_batch_norm(_pixels(x), stats.contiguous(), weight, bias, eps), x)


def gelu_batch_norm_grad_affine(grad_y: Tensor, x: Tensor, stats: Tensor, eps: float) -> Tensor:
    grads: Tensor = native().gelu_batch_norm_grad_affine(
        _pixels(grad_y), _pixels(x), stats.contiguous(), eps
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
    grad = native().gelu_batch_norm_grad_x(
        _pixels(grad_y), _pixels(x), stats.contiguous(), weight, grad_affine, eps
    )
    return _image(grad, x)


def _pixels(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` as contiguous ``[B * H * W, C]``."""
    return image.permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    image = pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=conv_memory_format(like))
