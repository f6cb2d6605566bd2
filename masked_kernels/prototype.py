"""Prototype: one short vector that fills every layer by repetition (PEMN, sections 3.3 and 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import check_float
from .draw import Draw, Shuffle

ROWS_PER_PATTERN = 64
"""An aligned period longer than a row must leave at least this many rows to each distinct row
pattern.
"""


class Prototype(nn.Module):
    """Frozen values repeated along the flattened weight: ``flat[i] = values[i % period]``.

    One instance registered in many layers is one buffer, and stays one through ``.to()``,
    ``copy.deepcopy`` and saving.

    Args:
        values: 1-D float tensor ``[period]``, at least one element. Not copied; it gets no
            gradient.
        draw: what the values are drawn by, or what they were before ``shuffle``; None if nothing
            makes them anew.
        shuffle: what the values are the result of; None for none.
    """

    values: Tensor

    def __init__(
        self, values: Tensor, draw: Draw | None = None, shuffle: Shuffle | None = None
    ) -> None:
        super().__init__()
        check_float("values", values)
        if values.dim() != 1 or values.numel() == 0:
            raise ValueError(
                f"values: got shape {tuple(values.shape)}, expected a 1-D tensor, not empty"
            )
        self.register_buffer("values", values.detach())
        self.draw, self.shuffle = draw, shuffle

    @classmethod
    def of_draw(cls, draw: Draw) -> "Prototype":
        """The numbers of ``draw``, float32 on the CPU; a file stores their seed."""
        return cls(draw.values(), draw)

    def shuffled(self, shuffle: Shuffle) -> "Prototype":
        """The values repeated and permuted; a file stores them as they are here, and the seed."""
        return Prototype(shuffle(self.values), self.draw, shuffle)

    @property
    def period(self) -> int:
        return self.values.numel()

    def fill(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A new tensor of ``shape``, row-major from offset 0: ``flat[i] = values[i % period]``."""
        size = torch.Size(shape)
        index = torch.arange(size.numel(), device=self.values.device) % self.period
        return self.values[index].view(size)

    def extra_repr(self) -> str:
        text = f"period={self.period}"
        if self.draw is not None:
            text += f", seed={self.draw.seed}"
        return text if self.shuffle is None else f"{text}, shuffle={self.shuffle.seed}"


def prototype_period(largest: int, ratio: float, align: Sequence[int] | None = None) -> int:
    """The prototype's length for a network whose largest masked layer has ``largest`` weights.

    ``int(largest * ratio) + 1`` for ratio < 1 and ``largest`` for 1, as the released PEMN code
    computes it. With ``align``, the period nearest to that (the shorter of two) which suits every
    row length K in ``align``: it divides K, so that all rows read the same values, or it is ``c *
    K`` with ``c * 64 <= largest // K``, so that each of the c row patterns serves 64 rows or more.

    Args:
        largest: number of weights of the largest masked layer, at least 1.
        ratio: prototype length over ``largest``, in (0, 1].
        align: row lengths (weights per output) to align with, or None for the paper's exact period.
    """
    if largest < 1:
        raise ValueError(f"largest: got {largest}, expected at least 1")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio: got {ratio}, expected a number in (0, 1]")
    exact = largest if ratio == 1.0 else int(largest * ratio) + 1
    if align is None:
        return exact
    if not align or any(k < 1 for k in align):
        raise ValueError(f"align: got {list(align)}, expected row lengths of at least 1")
    suitable = set.intersection(*(_aligned_periods(k, largest) for k in align))
    return min(suitable, key=lambda period: (abs(period - exact), period))


def _aligned_periods(row_length: int, largest: int) -> set[int]:
    divisors = {d for d in range(1, row_length + 1) if row_length % d == 0}
    most_patterns = largest // row_length // ROWS_PER_PATTERN
    return divisors | {c * row_length for c in range(1, most_patterns + 1)}
