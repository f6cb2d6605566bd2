"""Random masked weights."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import masked_kernels as mk


@dataclass(frozen=True)
class MaskedWeight:
    """A weight in all of its forms, float32; the mask has density 0.5.

    Args:
        weight: written out, before the mask.
        values: as our functions take it: a Prototype, or ``weight`` itself.
        mask: packed.
    """

    weight: Tensor
    values: Tensor | mk.Prototype
    mask: mk.PackedMask

    @functools.cached_property
    def float_mask(self) -> Tensor:
        return self.mask.unpack().float()

    @functools.cached_property
    def masked(self) -> Tensor:
        return self.weight * self.float_mask

    @property
    def packed_bytes(self) -> int:
        """Of the values and bits."""
        values = self.values.period if isinstance(self.values, mk.Prototype) else self.dense
        return 4 * (values + self.mask.words.numel())

    @property
    def dense(self) -> int:
        return self.weight.numel()


@functools.lru_cache(maxsize=1)
def masked_weight(shape: tuple[int, ...], ratio: float | None, align: bool) -> MaskedWeight:
    """Of a prototype of the ratio's period, the paper's or the aligned one; dense if ratio is None.

    The last one is kept: drawing 67 million weights takes as long as timing them.
    """
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape)
    mask = mk.PackedMask.from_bool(torch.rand(size, generator=generator) < 0.5)
    if ratio is None:
        weight = torch.randn(size, generator=generator)
        return MaskedWeight(weight, weight, mask)
    period = mk.prototype_period(size.numel(), ratio, [size[1:].numel()] if align else None)
    prototype = mk.Prototype(torch.randn(period, generator=generator))
    return MaskedWeight(prototype.fill(size), prototype, mask)


def values_name(ratio: float | None, align: bool) -> str:
    if ratio is None:
        return "dense"
    return f"prototype {ratio:g}{' aligned' if align else ''}"
