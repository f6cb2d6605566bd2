"""Scores to masks."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor

import masked_kernels as mk
from masked_kernels.backends import forget_thresholds

from ..problem import Case, ErrorOf, Problem, Provider, unchanged
from ..providers import sort_and_scatter, topk_and_scatter

DENSITY = 0.5
STEP = 1e-3
"""Of a training step, in units of the scores' standard deviation."""


@dataclass(frozen=True)
class SelectTopK(Case):
    """``numel`` float32 scores to the mask of the largest half by magnitude.

    ``warm`` takes a small step in place between the calls, as training does; else nothing is known
    of the scores.
    """

    numel: int
    warm: bool = False
    group: ClassVar[str] = "select_topk"

    @property
    def name(self) -> str:
        return f"select_topk n={self.numel:,}{' after a step' if self.warm else ''}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        draws = 1 if self.warm else 2
        inputs = tuple(torch.randn(1, self.numel, generator=generator) for _ in range(draws))
        rule = mk.TopK(DENSITY)
        keep = self.numel - int((1 - DENSITY) * self.numel)
        moved = 4 * self.numel + self.numel // 8

        def ours(scores: Tensor) -> Tensor:
            return rule.select(scores, backend)

        def provider(
            run: Callable[[Tensor], Any], moved: int | None = None, cold: bool = not self.warm
        ) -> Provider:
            step = self._steps() if self.warm else unchanged
            return Provider(
                run,
                prepare=Tensor.clone if self.warm else unchanged,
                refresh=(lambda scores: _forgotten(step(scores))) if cold else step,
                moved=moved,
            )

        providers = {
            "ours": lambda: provider(ours, moved),
            "torch.topk": lambda: provider(lambda scores: topk_and_scatter(scores, keep)),
        }
        if self.warm:
            providers["ours, cold"] = lambda: provider(ours, moved, cold=True)
        else:
            providers["sort and scatter"] = lambda: provider(
                lambda scores: sort_and_scatter(scores.abs(), keep)
            )
        return Problem(
            inputs,
            providers,
            lambda scores: _selection_error(scores, keep),
            dense=("torch.topk",),
        )

    def _steps(self) -> Callable[[Tensor], Tensor]:
        """Steps that lead back to the start, so that the scores do not drift off."""
        generator = torch.Generator().manual_seed(1)
        a, b = (STEP * torch.randn(1, self.numel, generator=generator) for _ in range(2))
        steps = cycle((a, b, -a, -b))
        return lambda scores: scores.add_(next(steps))


def _forgotten(scores: Tensor) -> Tensor:
    """The scores, as if none had been selected from."""
    forget_thresholds()
    return scores


def _selection_error(scores: Tensor, keep: int) -> ErrorOf:
    """0 if a mask keeps the ``keep`` largest by magnitude, ties either way; else infinity."""
    keys = scores.abs().flatten()

    def error(mask: Tensor, lossy: bool) -> float:
        if mask.dtype == torch.int32:
            mask = mk.PackedMask(mask, scores.shape).unpack()
        bits = mask.bool().flatten()
        kept, dropped = keys[bits], keys[~bits]
        right = kept.numel() == keep and (
            min(keep, dropped.numel()) == 0 or bool(kept.min() >= dropped.max())
        )
        return 0.0 if right else float("inf")

    return error


RESNET50 = 23_462_592  # its masked weights, all as one tensor

CASES = (
    *(SelectTopK(numel) for numel in (65_536, 2_359_296, RESNET50)),
    *(SelectTopK(numel, warm=True) for numel in (65_536, 2_359_296, RESNET50)),
)
"""A ConvMixer-256 pointwise layer, ResNet-18's largest layer, all of ResNet-50."""

QUICK = (CASES[0], CASES[1], CASES[4])
TOY = (SelectTopK(1_000), SelectTopK(1_000, warm=True))
