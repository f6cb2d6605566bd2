"""What a case is made of, and how results are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Provider = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Problem:
    """One case, ready to run.

    Args:
        inputs: what the providers are called with, in turn.
        providers: by name; the same function of the input.
        error: ``error(provider's result, input)``, against float64, in units of the error that
            plain PyTorch makes in the same dtype; for bits, 0 if right and infinity if not.
        baseline: the provider that plain PyTorch users would take.
    """

    inputs: tuple[Tensor, ...]
    providers: dict[str, Provider]
    error: Callable[[Any, Tensor], float]
    baseline: str


def sort_and_scatter(scores: Tensor, keep: int) -> Tensor:
    """What edge-popup and PEMN publish: a full sort, then two indexed writes into a float mask."""
    mask = scores.abs().clone()
    order = mask.flatten().sort().indices
    drop = scores.numel() - keep
    flat = mask.flatten()
    flat[order[:drop]] = 0
    flat[order[drop:]] = 1
    return mask


def error_ratio(got: Tensor, plain: Tensor, truth: Tensor) -> float:
    """Error of ``got`` over that of ``plain``, neither below one rounding of the dtype."""
    rounding = torch.finfo(plain.dtype).eps * truth.norm()
    floor = max(float((plain.double() - truth).norm()), float(rounding))
    return float((got.double() - truth).norm()) / floor
