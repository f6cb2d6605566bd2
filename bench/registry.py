"""The cases: what is computed, by whom, on which sizes.

A case builds a Problem: rotating inputs, providers that all compute the same function, and the way
to judge their results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_kernels as mk

Provider = Callable[[Tensor], Any]
ROTATION = 4


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


@dataclass(frozen=True)
class SelectTopK:
    """``numel`` float32 scores to the mask of the largest half by magnitude."""

    numel: int
    density: float = 0.5

    @property
    def name(self) -> str:
        return f"select_topk n={self.numel:,}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(torch.randn(1, self.numel, generator=generator) for _ in range(2))
        rule = mk.TopK(self.density)
        keep = self.numel - int((1 - self.density) * self.numel)
        return Problem(
            inputs,
            {
                "ours": lambda scores: rule.select(scores, backend),
                "torch.topk": lambda scores: topk_and_scatter(scores, keep),
                "sort and scatter": lambda scores: sort_and_scatter(scores, keep),
            },
            lambda mask, scores: selection_error(mask, scores, keep),
            baseline="torch.topk",
        )


@dataclass(frozen=True)
class MaskedLinear:
    """``x [batch, k]`` times a masked ``[n, k]``, float32.

    The weight repeats a prototype of the ratio's period, the paper's or the aligned one, or is
    dense if ratio is None.
    """

    n: int
    k: int
    batch: int
    ratio: float | None = 1e-2
    align: bool = False

    @property
    def name(self) -> str:
        values = "dense" if self.ratio is None else f"prototype {self.ratio:g}"
        values += " aligned" if self.align else ""
        return f"masked_linear {self.n}x{self.k} {values} batch={self.batch}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        shape = torch.Size((self.n, self.k))
        inputs = tuple(
            torch.randn(self.batch, self.k, generator=generator) for _ in range(ROTATION)
        )
        weight, values, mask = _weight(shape, self.ratio, self.align, generator)
        bits = mask.unpack().float()
        masked = weight * bits
        return Problem(
            inputs,
            {
                "ours": lambda x: mk.masked_linear(x, values, mask, backend=backend),
                "F.linear": lambda x: F.linear(x, masked),
                "F.linear(x, w * m)": lambda x: F.linear(x, weight * bits),
            },
            lambda y, x: error_ratio(y, F.linear(x, masked), F.linear(x.double(), masked.double())),
            baseline="F.linear",
        )


@dataclass(frozen=True)
class MaskedConv2d:
    """A masked convolution that keeps the size, float32, channels_last, with a prototype."""

    batch: int
    channels: int
    size: int
    outputs: int
    kernel: int
    groups: int = 1
    ratio: float = 1e-2
    align: bool = False

    @property
    def name(self) -> str:
        kind = "depthwise " if self.groups == self.channels else ""
        return (
            f"masked_conv2d {kind}{self.kernel}x{self.kernel} {self.channels}->{self.outputs} "
            f"on {self.batch}x{self.size}x{self.size}{' aligned' if self.align else ''}"
        )

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.channels, self.size, self.size)
        inputs = tuple(
            torch.randn(size, generator=generator).to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        shape = torch.Size((self.outputs, self.channels // self.groups, self.kernel, self.kernel))
        weight, values, mask = _weight(shape, self.ratio, self.align, generator)
        weight = weight.to(memory_format=torch.channels_last)
        bits = mask.unpack().float().to(memory_format=torch.channels_last)
        masked = weight * bits
        options: dict[str, Any] = {"padding": self.kernel // 2, "groups": self.groups}
        return Problem(
            inputs,
            {
                "ours": lambda x: mk.masked_conv2d(x, values, mask, backend=backend, **options),
                "F.conv2d": lambda x: F.conv2d(x, masked, **options),
                "F.conv2d(x, w * m)": lambda x: F.conv2d(x, weight * bits, **options),
            },
            lambda y, x: error_ratio(
                y,
                F.conv2d(x, masked, **options),
                F.conv2d(x.double(), masked.double(), **options),
            ),
            baseline="F.conv2d",
        )


Case = SelectTopK | MaskedLinear | MaskedConv2d

SIZES = ((1024, 1024), (4096, 4096), (11008, 4096), (8192, 8192))

CASES: tuple[Case, ...] = (
    *(SelectTopK(numel) for numel in (65_536, 2_359_296, 23_462_592)),
    *(MaskedLinear(n, k, batch) for n, k in SIZES for batch in (1, 8, 64)),
    *(
        MaskedLinear(n, k, batch, ratio, align=True)
        for n, k in SIZES
        for ratio in (1e-2, 1e-4)
        for batch in (1, 8, 64, 512)
    ),
    *(MaskedLinear(4096, 4096, batch, ratio=None) for batch in (1, 8, 64)),
    MaskedConv2d(64, 256, 16, 256, kernel=1, align=True),
    MaskedConv2d(64, 256, 16, 256, kernel=1),
    MaskedConv2d(64, 256, 16, 256, kernel=5, groups=256),
)
"""Sizes of ConvMixer-256, of ResNet-50 (its largest layer, all of it), of language models."""

QUICK: tuple[Case, ...] = (
    SelectTopK(65_536),
    SelectTopK(2_359_296),
    *(MaskedLinear(n, k, batch) for n, k in SIZES[:2] for batch in (1, 64)),
    *(MaskedLinear(n, k, batch, align=True) for n, k in SIZES[:2] for batch in (1, 64)),
    MaskedLinear(1024, 1024, 1, ratio=None),
    *CASES[-3:],
)

TOY: tuple[Case, ...] = (
    SelectTopK(1_000),
    MaskedLinear(33, 65, 3),
    MaskedLinear(33, 65, 3, align=True),
    MaskedLinear(16, 40, 2, ratio=None),
    MaskedConv2d(2, 4, 5, 6, kernel=3),
    MaskedConv2d(2, 4, 5, 4, kernel=3, groups=4),
)
"""Small enough for the tests."""


def topk_and_scatter(scores: Tensor, keep: int) -> Tensor:
    """The best that plain PyTorch offers: a bool mask."""
    flat = scores.abs().flatten()
    kept = flat.topk(keep, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, kept, True).view_as(scores)


def sort_and_scatter(scores: Tensor, keep: int) -> Tensor:
    """What edge-popup and PEMN publish: a full sort, then two indexed writes into a float mask."""
    mask = scores.abs().clone()
    order = mask.flatten().sort().indices
    drop = scores.numel() - keep
    flat = mask.flatten()
    flat[order[:drop]] = 0
    flat[order[drop:]] = 1
    return mask


def selection_error(mask: Tensor, scores: Tensor, keep: int) -> float:
    """0 if ``mask`` keeps the ``keep`` largest by magnitude, ties either way; else infinity."""
    if mask.dtype == torch.int32:
        mask = mk.PackedMask(mask, scores.shape).unpack()
    mask, keys = mask.bool().flatten(), scores.abs().double().flatten()
    kept, dropped = keys[mask], keys[~mask]
    right = kept.numel() == keep and (
        min(keep, dropped.numel()) == 0 or bool(kept.min() >= dropped.max())
    )
    return 0.0 if right else float("inf")


def error_ratio(got: Tensor, plain: Tensor, truth: Tensor) -> float:
    """Error of ``got`` over that of ``plain``, neither below one rounding of the dtype."""
    rounding = torch.finfo(plain.dtype).eps * truth.norm()
    floor = max(float((plain.double() - truth).norm()), float(rounding))
    return float((got.double() - truth).norm()) / floor


def _weight(
    shape: torch.Size, ratio: float | None, align: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor | mk.Prototype, mk.PackedMask]:
    """The weight written out, its values as our functions take them, and a mask of density 0.5."""
    mask = mk.PackedMask.from_bool(torch.rand(shape, generator=generator) < 0.5)
    if ratio is None:
        weight = torch.randn(shape, generator=generator)
        return weight, weight, mask
    row_lengths = [shape[1:].numel()] if align else None
    period = mk.prototype_period(shape.numel(), ratio, row_lengths)
    prototype = mk.Prototype(torch.randn(period, generator=generator))
    return prototype.fill(shape), prototype, mask
