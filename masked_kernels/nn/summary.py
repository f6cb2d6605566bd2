"""``summary(model)``: a table of the layers with a mask."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._text import table
from ..backends import AUTO, choose
from ._layer import Conv2dGeometry, FrozenLayer
from .compact import CompactLinear


@dataclass(frozen=True)
class LayerSummary:
    """One layer with a mask. ``mask_bytes`` counts ceil(N / 8); ``dense_bytes`` is the plain
    layer's float32 weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    values: str
    mask_bytes: int
    dense_bytes: int
    backend: str


@dataclass(frozen=True)
class Summary:
    """All masked layers of a model. ``value_bytes`` counts each shared prototype or dense weight
    once, in its own dtype.
    """

    layers: tuple[LayerSummary, ...]
    value_bytes: int

    def __str__(self) -> str:
        header = (
            "layer",
            "type",
            "shape",
            "density",
            "values",
            "mask bytes",
            "dense bytes",
            "backend",
        )
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                f"{layer.density:.4f}",
                layer.values,
                f"{layer.mask_bytes:,}",
                f"{layer.dense_bytes:,}",
                layer.backend,
            )
            for layer in self.layers
        ]
        mask_bytes = sum(layer.mask_bytes for layer in self.layers)
        dense_bytes = sum(layer.dense_bytes for layer in self.layers)
        total = f"masks {mask_bytes:,} B + values {self.value_bytes:,} B; dense {dense_bytes:,} B"
        return f"{table(header, rows)}\n{total}"


def summary(model: nn.Module) -> Summary:
    """Shape, density, values, bytes and backend of every layer of ``model`` with a mask."""
    layers = []
    shared: dict[int, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, FrozenLayer):
            continue
        values = module.held
        shared[values.data_ptr()] = values.numel() * values.element_size()
        numel = torch.Size(module.weight_shape).numel()
        mask = module.mask
        layers.append(
            LayerSummary(
                name,
                type(module).__name__,
                module.weight_shape,
                mask.density(),
                module._values_repr(),
                (numel + 7) // 8,
                4 * numel,
                _chosen_backend(module, mask.words, values),
            )
        )
    return Summary(tuple(layers), sum(shared.values()))


def _chosen_backend(layer: FrozenLayer, words: Tensor, values: Tensor) -> str:
    """The backend that the layer's forward runs on, as the automatic or requested choice stands
    now.
    """
    if isinstance(layer, Conv2dGeometry):
        x = values.new_empty((1, layer.in_channels, *layer.kernel_size))
        geometry = (list(layer.kernel_size), list(layer.stride), [0, 0], list(layer.dilation))
        arguments = (x, values, words, None, None, *geometry, layer.groups)
        return choose("masked_conv2d", AUTO, *arguments)
    x = values.new_empty((1, layer.weight_shape[1]))
    op = "compact_linear" if isinstance(layer, CompactLinear) else "masked_linear"
    return choose(op, AUTO, x, values, words, None, None)
