"""``inspect_file``: what is in a saved file, without building its model."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._text import table
from ..models.registry import ModelSpec
from .format import Contents, LayerRecord, naming, read
from .report import SizeReport, size_report


@dataclass(frozen=True)
class StoredLayer:
    """One masked layer of a file; ``mask_bytes`` are as stored, under ``codec``."""

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    values: str
    dtype: str
    codec: str
    mask_bytes: int


@dataclass(frozen=True)
class FileSummary:
    """Layers and sizes of a file, and the call that builds its model, if ``create_model`` did."""

    model: ModelSpec | None
    layers: tuple[StoredLayer, ...]
    sizes: SizeReport

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, with the two ratios of the size report."""
        ratios = {"ratio": self.sizes.ratio, "paper_ratio": self.sizes.paper_ratio}
        fields = asdict(self)
        return {**fields, "sizes": {**fields["sizes"], **ratios}}

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "density", "values", "dtype", "codec", "mask bytes")
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                f"{layer.density:.4f}",
                layer.values,
                layer.dtype,
                layer.codec,
                f"{layer.mask_bytes:,}",
            )
            for layer in self.layers
        ]
        model = self.model or "unnamed; load it with load_masked(path, into=model)"
        return f"model: {model}\n\n{table(header, rows)}\n\n{self.sizes}"


def inspect_file(path: str | os.PathLike[str]) -> FileSummary:
    """Read and check the file at ``path``; ``FormatError`` if it is damaged or no saved model."""
    path = Path(path)
    contents, size = read(path)
    with naming(path):
        layers = tuple(_stored_layer(contents, layer) for layer in contents.layers)
    return FileSummary(contents.model, layers, size_report(contents, size))


def _stored_layer(contents: Contents, layer: LayerRecord) -> StoredLayer:
    return StoredLayer(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        density=contents.mask(layer).density(),
        values=_values(contents, layer),
        dtype=str(contents.values_dtype(layer)).removeprefix("torch."),
        codec=layer.codec,
        mask_bytes=contents.require(f"mask/{layer.name}").numel(),
    )


def _values(contents: Contents, layer: LayerRecord) -> str:
    period, origin = contents.period(layer), contents.origins.get(layer.values)
    text = layer.values if period is None else f"{layer.values}, period {period}"
    for part in origin.seeds() if origin else ():
        text += {"draw": ", seeded", "shuffle": ", shuffled"}[part]
    return text
