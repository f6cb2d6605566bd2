"""Random pruning."""

import torch
from torch import Tensor, nn

from ..nn._init import stream
from .masks import Layers


def random(model: nn.Module, layers: Layers, seed: int) -> dict[str, Tensor]:
    """Uniform scores: every set of weights of the wanted size is as likely as another.

    A layer's draw depends on ``seed`` and on its position alone.
    """
    return {
        name: torch.rand(
            layer.weight.shape, generator=stream(seed, index, "pruning"), device="cpu"
        ).to(layer.weight.device)
        for index, (name, layer) in enumerate(layers.items())
    }
