"""PackedMask: one bit per weight."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _ops
from ._checks import check_shape, check_type
from .backends import AUTO
from .backends._layout import words_per_row


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a weight's matrix view: (shape[0], product of the rest); a 1-D weight is
    one row.
    """
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], shape[1:].numel()


class PackedMask:
    """An immutable binary mask of a weight, 32 bits to a word.

    With rows = ``shape[0]`` and cols = the product of the other dimensions (row-major, whatever the
    weight's memory format), ``words`` is int32 ``[rows, ceil(cols / 32)]``: bit j, least
    significant first, of word w of row r is element ``32 * w + j`` of that row. Padding bits are 0.
    A 1-D weight is one row. docs/format.md has a worked example.

    Args:
        words: int32 tensor ``[rows, ceil(cols / 32)]`` with zero padding bits. Not copied.
        shape: the weight's shape.
    """

    __slots__ = ("_bound", "_shape", "_words")  # _bound belongs to _bound.py

    def __init__(self, words: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
        check_type("words", words, Tensor)
        if words.dtype != torch.int32:
            raise TypeError(f"words: got dtype {words.dtype}, expected torch.int32")
        self._shape = torch.Size(shape)
        rows, cols = matrix_shape(self._shape)
        check_shape("words", words, (rows, words_per_row(cols)))
        self._words = words
        self._bound: Any = None

    @classmethod
    def from_bool(cls, mask: Tensor) -> "PackedMask":
        """Pack a bool tensor of any shape and memory format."""
        check_type("mask", mask, Tensor)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: got dtype {mask.dtype}, expected torch.bool")
        return cls(_ops.pack(mask.reshape(matrix_shape(mask.shape)), AUTO), mask.shape)

    @classmethod
    def from_bytes(cls, data: bytes, shape: torch.Size | tuple[int, ...]) -> "PackedMask":
        """The mask whose ``to_bytes`` is ``data``, on the CPU; raises ``ValueError`` if the length
        or the unused last bits do not fit.
        """
        size = torch.Size(shape)
        count = size.numel()
        if len(data) != (count + 7) // 8:
            raise ValueError(
                f"data: got {len(data)} bytes, expected {(count + 7) // 8} for shape {tuple(size)}"
            )
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        if bits[count:].any():
            raise ValueError(
                f"data: got set bits after bit {count}, expected zeros to the end of the last byte"
            )
        rows, cols = matrix_shape(size)
        width = 32 * words_per_row(cols)
        padded = np.zeros((rows, width), np.uint8)
        padded[:, :cols] = bits[:count].reshape(rows, cols)
        # On the host without a backend: the one in use may be that of a GPU.
        words = np.packbits(padded, bitorder="little").view("<i4").astype(np.int32, copy=False)
        return cls(torch.from_numpy(words.reshape(rows, width // 32)), size)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def words(self) -> Tensor:
        return self._words

    @property
    def device(self) -> torch.device:
        return self._words.device

    def count(self) -> int:
        """Number of weights kept."""
        return int(_ops.popcount(self._words, AUTO).sum())

    def density(self) -> float:
        """Fraction of weights kept; 0 for an empty weight."""
        return self.count() / max(self._shape.numel(), 1)

    def unpack(self) -> Tensor:
        """The mask as a contiguous bool tensor of ``shape``."""
        _, cols = matrix_shape(self._shape)
        mask: Tensor = _ops.unpack(self._words, cols, AUTO)
        return mask.view(self._shape)

    def transpose(self) -> "PackedMask":
        """The mask of the transposed matrix view, shape ``(cols, rows)``."""
        rows, cols = matrix_shape(self._shape)
        return PackedMask(_ops.transpose(self._words, cols, AUTO), (cols, rows))

    def to_bytes(self) -> bytes:
        """ceil(N / 8) bytes: element i is bit ``i % 8``, least significant first, of byte ``i //
        8``; rows are not padded.
        """
        return np.packbits(self.unpack().flatten().cpu().numpy(), bitorder="little").tobytes()

    def to(self, device: torch.device | str) -> "PackedMask":
        return PackedMask(self._words.to(device), self._shape)

    def iou(self, other: "PackedMask") -> float:
        """Intersection over union; 1 for two empty masks."""
        union = (self | other).count()
        return (self & other).count() / union if union else 1.0

    def __and__(self, other: "PackedMask") -> "PackedMask":
        return PackedMask(self._words & self._other_words(other), self._shape)

    def __or__(self, other: "PackedMask") -> "PackedMask":
        return PackedMask(self._words | self._other_words(other), self._shape)

    def __xor__(self, other: "PackedMask") -> "PackedMask":
        return PackedMask(self._words ^ self._other_words(other), self._shape)

    def __invert__(self) -> "PackedMask":
        words = ~self._words
        _, cols = matrix_shape(self._shape)
        if tail := cols % 32:
            words[:, -1] &= (1 << tail) - 1
        return PackedMask(words, self._shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self._shape == other._shape and torch.equal(self._words, other._words)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shape = tuple(self._shape)
        return f"PackedMask(shape={shape}, density={self.density():.4f}, device={self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedMask, (self._words, self._shape)

    def _other_words(self, other: "PackedMask") -> Tensor:
        check_type("other", other, PackedMask)
        if other._shape != self._shape:
            raise ValueError(
                f"other: got shape {tuple(other._shape)}, expected {tuple(self._shape)}"
            )
        return other._words
