"""``prune_model_``: a plain model into one that trains the weights kept, and no others."""

from torch import nn

from .._checks import check_shape
from ..nn.convert import ConversionReport, _check_contains, _replace
from ..nn.pruned import prune_layer
from ..nn.targets import FilterFn, Plain, find_targets
from .magnitude import magnitude
from .masks import Method, prune_masks
from .random import random

METHODS: dict[str, Method] = {"random": random, "magnitude": magnitude}
"""Methods that need no data, by name."""


def prune_model_(
    model: nn.Module,
    method: str | Method = "magnitude",
    *,
    density: float,
    scope: str = "layer",
    filter_fn: FilterFn | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Replace every ``nn.Linear`` and ``nn.Conv2d`` inside ``model`` by its pruned form, in place.

    Weights and biases stay the parameters they were; a dropped weight is 0 from now on. Pruning a
    model at initialisation and training it is PEMN's baseline (section 4.3.2). Global random state
    is untouched.

    Args:
        model: a module that contains the layers.
        method: ``random``, ``magnitude``, or a function that scores the weights.
        density: fraction of the weights kept, from 0 to 1; ``density_at_saving`` has the one for a
            storage budget.
        scope: ``layer`` keeps that fraction of each layer, ``global`` of all together.
        filter_fn: ``filter_fn(name, module)`` decides which layers to prune; None prunes all.
        seed: of all draws.

    Returns:
        The layers pruned, with the number of weights each keeps, and those skipped with the reason.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"method: got {method!r}, expected one of {', '.join(METHODS)} or a function"
            )
        method = METHODS[method]
    _check_contains(model, Plain)
    layers, skipped = find_targets(model, filter_fn, prototype=False)
    scores = method(model, layers, seed)
    if scores.keys() != layers.keys():
        raise ValueError(f"method: got scores of {list(scores)}, expected those of {list(layers)}")
    for name, layer in layers.items():
        check_shape(f"scores of {name!r}", scores[name], layer.weight.shape)
    masks = prune_masks(scores, density, scope)
    pruned = {layer: prune_layer(layer, masks[name]) for name, layer in layers.items()}
    _replace(model, pruned)
    return ConversionReport({name: repr(pruned[layer]) for name, layer in layers.items()}, skipped)
