"""What a file holds of a prototype: its values, or the seeds that make them anew."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES
from ..draw import Draw, Shuffle
from ..prototype import Prototype

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class Origin:
    """How a prototype's values come about.

    Args:
        dtype: of the values, as ``float32``.
        draw: makes them, or what ``shuffle`` takes; None if those are stored.
        shuffle: is done to what is drawn or stored; None for nothing.
    """

    dtype: str
    draw: Draw | None
    shuffle: Shuffle | None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        if self.draw is None and self.shuffle is None:
            raise ValueError("draw, shuffle: got neither, expected one of them")
        if self.draw and self.shuffle and self.draw.count != self.shuffle.period:
            raise ValueError(f"draw: got count {self.draw.count}, expected {self.shuffle.period}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def period(self) -> int:
        if self.shuffle is not None:
            return self.shuffle.length
        assert self.draw is not None
        return self.draw.count

    def seeds(self) -> dict[str, int]:
        parts = {"draw": self.draw, "shuffle": self.shuffle}
        return {name: part.seed for name, part in parts.items() if part is not None}

    def make(self, stored: Tensor | None) -> Prototype:
        """The prototype, on the CPU; ``stored`` is what is not drawn."""
        values = stored if self.draw is None else self.draw.values().to(self.torch_dtype)
        if values is None or (self.shuffle and values.numel() != self.shuffle.period):
            raise ValueError(f"values: got {values}, expected those that {self.shuffle} takes")
        return Prototype(self.shuffle(values) if self.shuffle else values, self.draw, self.shuffle)

    def to_dict(self, seeds: dict[int, str]) -> dict[str, Any]:
        """JSON-able fields, with names from ``seeds`` for the seeds."""
        fields = asdict(self)
        for part, seed in self.seeds().items():
            fields[part]["seed"] = seeds[seed]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any], seeds: dict[str, int]) -> "Origin":
        parts: dict[str, Any] = {}
        for part, kind in (("draw", Draw), ("shuffle", Shuffle)):
            of_part = fields[part]
            parts[part] = of_part and kind(**{**of_part, "seed": seeds[of_part["seed"]]})
        return cls(fields["dtype"], **parts)


def origin_of(prototype: Prototype) -> tuple[Tensor | None, Origin | None]:
    """What to store of a prototype, and how its values come of it: exactly the values it has now,
    which may have changed since they were drawn.
    """
    values, draw, shuffle = prototype.values.detach(), prototype.draw, prototype.shuffle
    if shuffle is not None:
        short = shuffle.undo(values)
        if not torch.equal(shuffle(short), values):
            return values, None
        values = short
    if draw is not None and not torch.equal(draw.values().to(values.dtype), values.cpu()):
        draw = None
    if draw is None and shuffle is None:
        return values, None
    dtype = str(values.dtype).removeprefix("torch.")
    return None if draw else values, Origin(dtype, draw, shuffle)
