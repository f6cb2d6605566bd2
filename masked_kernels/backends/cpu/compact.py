"""``compact_linear``: a dense weight of which only the kept values are there."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import as_float, isa, native, optional_float, scaled_
from ._relaid import relaid
from .bits import popcount, unpack
from .plan import Plan, linear_plan


def compact_linear(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    return bind_compact_linear(x, kept, words, bias, scale)(x)


def bind_compact_linear(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """``compact_linear`` of tensors like x, the kernel chosen."""
    sizes = x.shape[0], words.shape[0], x.shape[1], kept.numel()
    run = COMPACT[linear_plan(*sizes, x.dtype, isa(), compact=True)]
    return lambda x: run(x, kept, words, bias, scale)


def _direct_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    y: Tensor = native().compact_linear(*_operands(x, values, words, bias, scale))
    return y


def _panels_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    if x.dtype == torch.float32:
        y: Tensor = native().compact_panel_linear(*_operands(x, values, words, bias, scale))
        return y
    _starts(values, words)
    weight = values.new_zeros(words.shape[0], x.shape[1])
    weight.masked_scatter_(unpack(words, x.shape[1]), values)
    return F.linear(x, scaled_(weight, scale), bias)


COMPACT: dict[Plan, Callable[..., Tensor]] = {"direct": _direct_linear, "panels": _panels_linear}
"""``compact_linear`` of each plan; their results differ by rounding alone."""


def _operands(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the kernels take them."""
    inputs = as_float(x), as_float(values), _starts(values, words), words.contiguous()
    return *inputs, optional_float(bias), optional_float(scale)


def _starts(values: Tensor, words: Tensor) -> Tensor:
    """Where each row begins among the kept values; ``ValueError`` if there are not as many of them
    as set bits.
    """

    def counted() -> tuple[Tensor, int]:
        counts = popcount(words)
        return counts.cumsum(0) - counts, int(counts.sum())

    starts, count = relaid(words, "starts", counted)
    if values.numel() != count:
        raise ValueError(
            f"kept: got {values.numel()} values, expected {count}, as many as set bits"
        )
    return starts
