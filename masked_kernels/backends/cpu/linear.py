"""Masked linear layers, forward and backward."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import as_float, is_float, isa, native, optional_float, scaled_
from ._scratch import decoded, scratch
from .aligned import aligned_linear, aligned_linear_grad_x, bind_aligned_linear
from .grad import apply_scores, masked_
from .panels import panel_linear
from .plan import Plan, linear_plan, row_patterns
from .product import grad_weight, grad_x

_PANEL_BYTES = 1 << 22  # small enough for the L2 caches, large enough to occupy the threads
# Of grad_x, where each row pattern is a product of its own that starts anew.
_WEIGHTS_PER_PATTERN, _FEWER_WEIGHTS = 1 << 18, 1 << 16
_TOKENS_PER_PATTERN = 1 << 10  # that fewer weights need


def masked_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    rows = words.shape[0]
    plan = linear_plan(x.shape[0], rows, x.shape[1], values.numel(), x.dtype, isa())
    return LINEAR[plan](x, values, words, bias, scale)


def bind_masked_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """``masked_linear`` of tensors like x, the kernel chosen."""
    rows = words.shape[0]
    plan = linear_plan(x.shape[0], rows, x.shape[1], values.numel(), x.dtype, isa())
    if all(t is None or is_float(t) for t in (x, values, bias, scale)) and words.is_contiguous():
        if plan == "aligned":
            return bind_aligned_linear(x, values, words, bias, scale)
        if plan == "direct":
            run = native().masked_linear.default
            return lambda x: run(x, values, words, bias, scale)
        panel_linear = native().panel_linear.default
        return lambda x: panel_linear(x, values, words, bias, scale, ())
    run = LINEAR[plan]
    return lambda x: run(x, values, words, bias, scale)


def masked_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    rows = words.shape[0]
    plan = linear_plan(grad_y.shape[0], rows, cols, values.numel(), grad_y.dtype, isa())
    if plan == "aligned" and _is_aligned_grad_x(
        grad_y.shape[0], rows * cols, row_patterns(cols, values.numel()) or 1
    ):
        return aligned_linear_grad_x(grad_y, values, words, scale, cols)
    # A sum over panels would round to 16 bits after each of them.
    if rows <= _panel_height(values, cols) or grad_y.dtype in (torch.float16, torch.bfloat16):
        return grad_x(grad_y, scaled_(decoded(values, words, cols), scale))
    sums = grad_y.new_empty((grad_y.shape[0], cols))
    for begin, end, panel in _panels(values, words, cols, scale):
        sums.addmm_(grad_y[:, begin:end], panel, beta=int(begin > 0))
    return sums


def _is_aligned_grad_x(tokens: int, weights: int, patterns: int) -> bool:
    """Whether the binary product pays, measured on AVX2: 1.2 to 2.8 times faster where it does."""
    if weights >= _WEIGHTS_PER_PATTERN * patterns:
        return True
    return weights >= _FEWER_WEIGHTS * patterns and tokens >= _TOKENS_PER_PATTERN * patterns


def masked_linear_grad_weight(
    grad_y: Tensor, x: Tensor, words: Tensor, scale: Tensor | None
) -> Tensor:
    return masked_(scaled_(grad_weight(grad_y, x), scale), words)


def scored_linear_grad_scores(
    grad_y: Tensor, x: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    return apply_scores(grad_weight(grad_y, x), values, scores, scale, absolute)


def _direct_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    y: Tensor = native().masked_linear(
        as_float(x),
        as_float(values),
        words.contiguous(),
        optional_float(bias),
        optional_float(scale),
    )
    return y if x.dtype == y.dtype else y.to(x.dtype)


def _panels_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    if is_float(x) and is_float(values):
        return panel_linear(x, values, words, bias, scale)
    if words.shape[0] <= _panel_height(values, x.shape[1]):
        return F.linear(x, scaled_(decoded(values, words, x.shape[1]), scale), bias)
    y = x.new_empty((x.shape[0], words.shape[0]))
    for begin, end, panel in _panels(values, words, x.shape[1], scale):
        out = y[:, begin:end]
        added = out if bias is None else bias[begin:end]
        torch.addmm(added, x, panel.t(), beta=int(bias is not None), out=out)
    return y


LINEAR: dict[Plan, Callable[..., Tensor]] = {
    "aligned": aligned_linear,
    "direct": _direct_linear,
    "panels": _panels_linear,
}
"""``masked_linear`` of each plan; their results differ by rounding alone."""


def _panels(
    values: Tensor, words: Tensor, cols: int, scale: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (begin, end, weight rows [begin, end)); each panel is good until the next step.

    Scaling the weight, not the product, rounds as plain PyTorch does: where all rows are equal
    there is little to average out, and products rounded otherwise are three times apart.
    """
    values, words = values.contiguous(), words.contiguous()
    rows, height = words.shape[0], _panel_height(values, cols)
    memory = scratch(min(height, rows), cols, values.dtype)
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        panel = memory[: end - begin]
        native().decode_(panel, values, words, begin)
        yield begin, end, scaled_(panel, scale)


def _panel_height(values: Tensor, cols: int) -> int:
    return max(64, _PANEL_BYTES // max(cols * values.element_size(), 1))
