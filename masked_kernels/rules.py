"""Rules turn scores into masks: exact top-k, threshold, N:M.

A rule is a frozen dataclass. ``rule(scores)`` is a PackedMask; the straight-through gradient is in
``functional.scored_*``.
"""

import abc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._checks import check_float, check_fraction
from .backends import AUTO
from .mask import PackedMask, matrix_shape


class Rule(abc.ABC):
    """Base of all rules; ``absolute`` says whether |score| is ranked, which puts sign(score) into
    the score gradient.
    """

    absolute: bool

    def __call__(self, scores: Tensor) -> PackedMask:
        """The mask of ``scores`` (any shape, float). Raises ``ValueError`` if a score is NaN; on a
        GPU a later selection does, or ``backends.check_scores()``.
        """
        check_float("scores", scores)
        return PackedMask(self.select(scores), scores.shape)

    @abc.abstractmethod
    def select(self, scores: Tensor, backend: str = AUTO) -> Tensor:
        """The words of the mask, int32 ``[rows, ceil(cols / 32)]``."""

    def select_many(self, scores: Sequence[Tensor], backend: str = AUTO) -> list[Tensor]:
        """``select`` of each, for the layers of a whole model."""
        return [self.select(s, backend) for s in scores]

    def weight_scale(self, words: Tensor, numel: int) -> Tensor | None:
        """0-d factor of the masked weight, or None for 1."""
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Rule":
        rules = {rule.__name__: rule for rule in (TopK, Threshold, NM)}
        name = fields.get("name")
        if name not in rules:
            raise ValueError(f"rule: got name {name!r}, expected one of {', '.join(rules)}")
        return rules[name](**{key: value for key, value in fields.items() if key != "name"})


@dataclass(frozen=True)
class TopK(Rule):
    """Keep ``n - int((1 - density) * n)`` of a tensor's n weights: those with the largest scores
    (edge-popup, PEMN section 3.1).

    Exactly that many, ties or not: among equal scores the lower flat index is dropped first.

    Args:
        density: fraction kept, from 0 to 1.
        absolute: rank |score|; False ranks the raw score.
    """

    density: float = 0.5
    absolute: bool = True

    def __post_init__(self) -> None:
        check_fraction("density", self.density)

    def select(self, scores: Tensor, backend: str = AUTO) -> Tensor:
        words: Tensor = _ops.select_topk(
            _matrix(scores), self.drop(scores.numel()), self.absolute, backend
        )
        return words

    def select_many(self, scores: Sequence[Tensor], backend: str = AUTO) -> list[Tensor]:
        """``select`` of each, in one call that shares the threads among them."""
        drops = [self.drop(s.numel()) for s in scores]
        words: list[Tensor] = _ops.select_topk_many(
            [_matrix(s) for s in scores], drops, self.absolute, backend
        )
        return words

    def drop(self, numel: int) -> int:
        """How many of ``numel`` weights are dropped."""
        return int((1 - self.density) * numel)


@dataclass(frozen=True)
class Threshold(Rule):
    """Keep the weights with ``score > threshold`` (Piggyback; Self-Masking Networks, section 3.1).

    Args:
        threshold: a score equal to it is dropped.
        rescale: divide the weight by the square root of this tensor's density. The density counts
            as a constant in the backward.
    """

    threshold: float = 0.0
    rescale: bool = False

    @property
    def absolute(self) -> bool:  # type: ignore[override]
        return False

    def select(self, scores: Tensor, backend: str = AUTO) -> Tensor:
        words: Tensor = _ops.select_threshold(_matrix(scores), self.threshold, backend)
        return words

    def weight_scale(self, words: Tensor, numel: int) -> Tensor | None:
        if not self.rescale:
            return None
        kept = (
            _ops.popcount(words, AUTO).sum().clamp(min=1)
        )  # an empty mask has no density to divide by
        scale: Tensor = (numel / kept).sqrt()
        return scale


@dataclass(frozen=True)
class NM(Rule):
    """Keep the n largest of every m consecutive weights of a row; a shorter last group keeps at
    most n.

    Among equal scores the lower index is dropped first.

    Args:
        n: weights kept per group, from 0 to m.
        m: group length, at least 1.
        absolute: rank |score|; False ranks the raw score.
    """

    n: int = 2
    m: int = 4
    absolute: bool = True

    def __post_init__(self) -> None:
        if self.m < 1 or not 0 <= self.n <= self.m:
            raise ValueError(
                f"n, m: got {self.n}:{self.m}, expected m of at least 1 and n from 0 to m"
            )

    @property
    def density(self) -> float:
        """Fraction kept of whole groups."""
        return self.n / self.m

    def select(self, scores: Tensor, backend: str = AUTO) -> Tensor:
        words: Tensor = _ops.select_nm(_matrix(scores), self.n, self.m, self.absolute, backend)
        return words


class Selected(Rule):
    """A rule whose selection is done: ``words`` are the mask of whatever scores come.

    Args:
        rule: the rule that selected.
        words: int32 ``[rows, ceil(cols / 32)]``.
        absolute: None for that of the rule.
    """

    def __init__(self, rule: Rule, words: Tensor, absolute: bool | None = None) -> None:
        self.rule, self.words = rule, words
        self.absolute = rule.absolute if absolute is None else absolute

    def select(self, scores: Tensor, backend: str = AUTO) -> Tensor:
        return self.words

    def weight_scale(self, words: Tensor, numel: int) -> Tensor | None:
        return self.rule.weight_scale(words, numel)


def _matrix(scores: Tensor) -> Tensor:
    return scores.detach().reshape(matrix_shape(torch.Size(scores.shape)))
