"""The frozen values of every layer of a model that is being masked."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from ..draw import Shuffle
from ..prototype import Prototype, prototype_period
from ._init import draw_weight, stream, weight_draw
from .config import MaskConfig

Layers = Mapping[str, nn.Linear | nn.Conv2d]

_SHUFFLES = 1 << 32  # streams of layers come before


def make_values(layers: Layers, config: MaskConfig, seed: int) -> dict[str, Tensor | Prototype]:
    """The values of each layer; shared ones are one object."""
    if not layers:
        return {}
    if config.values == "pretrained":
        return {name: layer.weight.detach() for name, layer in layers.items()}
    names = list(layers)
    density = config.fan_density

    def draw(name: str, count: int | None = None) -> Tensor | Prototype:
        """The layer's weight, or a prototype of its first ``count`` elements."""
        weight, index = layers[name].weight, names.index(name)
        if config.seeded:
            whole = weight_draw(weight.shape, config.weight_init, density, seed, index)
            return Prototype.of_draw(whole.first(count or whole.count)).to(
                weight.device, weight.dtype
            )
        fresh = draw_weight(
            weight.shape, config.weight_init, density, stream(seed, index, "weight")
        ).to(weight.device, weight.dtype)
        return fresh if count is None else Prototype(fresh.flatten()[:count].clone())

    if config.values == "random":
        return {name: draw(name) for name in names}
    if config.values == "one_layer":
        first: dict[tuple[int, ...], Tensor | Prototype] = {}
        for name, layer in layers.items():
            if tuple(layer.weight.shape) not in first:
                values = draw(name)
                if isinstance(values, Tensor):
                    values = nn.Parameter(values, requires_grad=False)
                first[tuple(layer.weight.shape)] = values
        return {name: first[tuple(layer.weight.shape)] for name, layer in layers.items()}

    largest = max(names, key=lambda name: layers[name].weight.numel())  # the first of equals
    size = layers[largest].weight.numel()
    ratio = 1.0 if config.ratio is None else config.ratio
    align = [_dominant_row_length(layers)] if config.align else None
    prototype = draw(largest, prototype_period(size, ratio, align))
    assert isinstance(prototype, Prototype)
    if config.mode == "rand":
        prototype = prototype.shuffled(Shuffle(seed, _SHUFFLES, prototype.period, size))
    return dict.fromkeys(names, prototype)


def _dominant_row_length(layers: Layers) -> int:
    """The row length that holds the most weights."""
    weights: Counter[int] = Counter()
    for layer in layers.values():
        weights[layer.weight[0].numel()] += layer.weight.numel()
    return weights.most_common(1)[0][0]
