"""Magnitude pruning ("minimum" in PEMN)."""

from torch import Tensor, nn

from .masks import Layers


def magnitude(model: nn.Module, layers: Layers, seed: int) -> dict[str, Tensor]:
    """``abs(weight)``: the smallest weights are dropped. Nothing is drawn."""
    return {name: layer.weight.detach().abs() for name, layer in layers.items()}
