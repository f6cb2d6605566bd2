"""SizeReport: the real bytes of a saved model beside the paper's formula."""

from dataclasses import dataclass

from torch import Tensor

from .._text import table
from .format import Contents


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a saved file by part; masks, values, others and header add up to the file.

    Args:
        mask_bytes_raw: ceil(N / 8) summed over the masks.
        mask_bytes: of the masks as stored, under their codecs.
        value_bytes: of prototypes and dense weights, each once, in their own dtype; 8 for a seed
            that makes them anew.
        other_bytes: of biases, scales, normalisation, and all other state.
        header_bytes: of names, shapes, manifest and digest.
        file_bytes: of the whole file.
        dense_bytes: of the state of the same model with plain layers, in float32 (integer buffers
            in their own dtype).
        weights: maskable weights N, over all masked layers.
        values: stored frozen values V.
        seeds: stored seeds S.
    """

    mask_bytes_raw: int
    mask_bytes: int
    value_bytes: int
    other_bytes: int
    header_bytes: int
    file_bytes: int
    dense_bytes: int
    weights: int
    values: int
    seeds: int

    @property
    def ratio(self) -> float:
        """Size of the file over that of the whole dense float32 model."""
        return self.file_bytes / max(self.dense_bytes, 1)

    @property
    def paper_ratio(self) -> float:
        """``(N + 32 V + 64 S) / 32 N``: bits, float32 values and seeds over the maskable weights in
        float32.

        PEMN (section 4.3.1) plots 1 minus this, and has no seeds. It leaves out normalisation,
        biases and header.
        """
        stored = self.weights + 32 * self.values + 64 * self.seeds
        return stored / max(32 * self.weights, 1)

    def _values_note(self) -> str:
        notes = [f"{self.values:,} frozen values"] if self.values or not self.seeds else []
        if self.seeds:
            notes.append(f"{self.seeds} seed{'s' if self.seeds > 1 else ''} of 8 B")
        return ", ".join(notes)

    def __str__(self) -> str:
        parts = (
            (
                "mask bits",
                self.mask_bytes,
                f"{self.weights:,} weights, {self.mask_bytes_raw:,} B raw",
            ),
            ("values", self.value_bytes, self._values_note()),
            ("other tensors", self.other_bytes, "biases, scales, normalisation, other state"),
            ("header", self.header_bytes, "names, shapes, manifest, digest"),
            ("file", self.file_bytes, f"{self.ratio:.2%} of dense, saves {1 - self.ratio:.2%}"),
            ("dense float32", self.dense_bytes, "the same model with plain layers"),
        )
        paper = f"{self.paper_ratio:.2%} of dense, saves {1 - self.paper_ratio:.2%}"
        rows = [(part, f"{size:>13,}", note) for part, size, note in parts]
        rows.append(
            (
                "paper's formula",
                "",
                f"{paper} (1 bit a weight + float32 values; masked weights only)",
            )
        )
        return table(("part", f"{'bytes':>13}", "what"), rows)


def size_report(contents: Contents, file_bytes: int) -> SizeReport:
    """The report of a file of ``file_bytes`` bytes with these contents."""
    tensors = contents.tensors
    masks = {n: t for n, t in tensors.items() if n.startswith("mask/")}
    seeds = {n: t for n, t in tensors.items() if n.startswith("seed/")}
    names = {layer.values for layer in contents.layers}
    values = {n: t for n, t in tensors.items() if n in names}
    counted = masks.keys() | values.keys() | seeds.keys()
    others = {n: t for n, t in tensors.items() if n not in counted}
    # A masked layer's scale has no place in the plain layer, whose weight includes it.
    dense = [t for n, t in others.items() if not n.startswith("scale/")]
    weights = sum(layer.numel for layer in contents.layers)
    stored = sum(_bytes(t) for t in tensors.values())
    return SizeReport(
        mask_bytes_raw=sum((layer.numel + 7) // 8 for layer in contents.layers),
        mask_bytes=sum(map(_bytes, masks.values())),
        value_bytes=sum(map(_bytes, (*values.values(), *seeds.values()))),
        other_bytes=sum(map(_bytes, others.values())),
        header_bytes=file_bytes - stored,
        file_bytes=file_bytes,
        dense_bytes=4 * weights + sum(map(_float32_bytes, dense)),
        weights=weights,
        values=sum(t.numel() for t in values.values()),
        seeds=len(seeds),
    )


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _float32_bytes(t: Tensor) -> int:
    return 4 * t.numel() if t.is_floating_point() else _bytes(t)
