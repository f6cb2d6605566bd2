"""From a score for every weight to one mask for every layer."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..backends import check_scores
from ..mask import PackedMask
from ..rules import TopK

Layers = Mapping[str, nn.Linear | nn.Conv2d]
"""The layers to prune, by name, in module order."""

Method = Callable[[nn.Module, Layers, int], dict[str, Tensor]]
"""``method(model, layers, seed)`` gives a float score to every weight of every layer, of the
weight's shape; the weights of the largest scores are kept.
"""

SCOPES = ("layer", "global")
"""Whether weights compete within their layer or with those of all layers."""


def prune_masks(
    scores: Mapping[str, Tensor], density: float, scope: str = "layer"
) -> dict[str, PackedMask]:
    """The masks that keep the largest scores, exactly ``n - int((1 - density) * n)`` of n.

    Among equal scores the lower flat index is dropped first, in earlier layers before later ones.

    Args:
        scores: of every layer, of its weight's shape. Raises ``ValueError`` if one is NaN.
        density: fraction kept, from 0 to 1.
        scope: ``layer`` keeps that many of each layer, ``global`` that many of all together.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: got {scope!r}, expected one of {', '.join(SCOPES)}")
    rule = TopK(density, absolute=False)
    if scope == "layer" or not scores:
        masks = {name: rule(s) for name, s in scores.items()}
    else:
        kept = rule(torch.cat([s.flatten() for s in scores.values()])).unpack()
        parts = kept.split([s.numel() for s in scores.values()])
        masks = {
            name: PackedMask.from_bool(part.view(s.shape))
            for (name, s), part in zip(scores.items(), parts, strict=True)
        }
    check_scores()
    return masks
