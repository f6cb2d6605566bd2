"""``compact_linear``: a dense weight of which only the kept values are there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native import as_float, isa, native, optional_float, scaled_
from ._relaid import relaid
from .bits import popcount, unpack

_MOST_TOKENS = 16  # beyond, spreading the values once costs less than for every few tokens


def compact_linear(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    tokens, cols = x.shape
    starts, count = relaid(words, "starts", lambda: _starts(words))
    if kept.numel() != count:
        raise ValueError(f"kept: got {kept.numel()} values, expected {count}, as many as set bits")
    if isa() != "scalar" and x.dtype == torch.float32 and tokens <= _MOST_TOKENS:
        y: Tensor = native().compact_linear(
            as_float(x),
            as_float(kept),
            starts,
            words.contiguous(),
            optional_float(bias),
            optional_float(scale),
        )
        return y
    weight = kept.new_zeros(words.shape[0], cols).masked_scatter_(unpack(words, cols), kept)
    return F.linear(x, scaled_(weight, scale), bias)


def _starts(words: Tensor) -> tuple[Tensor, int]:
    """Where each row begins among the kept values, and how many these are."""
    counts = popcount(words)
    return counts.cumsum(0) - counts, int(counts.sum())
