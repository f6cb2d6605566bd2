"""From the gradient of an effective weight to that of what it was made of."""

from torch import Tensor

from ._native import as_float, native, optional_float


def masked_(weight: Tensor, words: Tensor) -> Tensor:
    """Clear, in place, the elements of a contiguous weight whose bit is not set."""
    if weight.numel():
        matrix = weight.view(words.shape[0], -1)
        native().decode_(matrix, matrix, words.contiguous(), 0)
    return weight


def apply_scores(
    grad: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    grad = as_float(grad)
    signs = as_float(scores) if absolute else None
    native().scored_grad_(grad, as_float(values), signs, optional_float(scale))
    return grad.to(scores.dtype)
