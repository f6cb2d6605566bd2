"""What ``scored_conv2d_grads`` means, in terms of a backend's own ops."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def scored_conv2d_grads(
    masked_conv2d_grad_x: Callable[..., Tensor],
    scored_conv2d_grad_scores: Callable[..., Tensor],
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    scores: Tensor,
    scale: Tensor | None,
    absolute: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the scores."""
    kernel_size = list(scores.shape[2:])
    return (
        masked_conv2d_grad_x(grad_y, x, values, words, scale, kernel_size, *geometry),
        scored_conv2d_grad_scores(grad_y, x, values, scores, scale, absolute, *geometry),
    )
