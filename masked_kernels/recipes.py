"""The papers' recipes as MaskConfig presets.

``density`` is the fraction kept, of every layer. Further keywords are fields of MaskConfig:
``rule=NM(2, 4)`` replaces the top-k rule, ``seeded=True`` makes values that a file stores as a
seed, ``weight_init`` and ``score_init`` choose how weights and scores start.
"""

from typing import Any

from .nn.config import MaskConfig
from .rules import Threshold, TopK


def edge_popup(density: float = 0.5, **fields: Any) -> MaskConfig:
    """Random weights, top-k masks (edge-popup; "Mask" in PEMN, section 4.2)."""
    return _drawn(density, fields, values="random")


def one_layer(density: float = 0.5, **fields: Any) -> MaskConfig:
    """Layers of equal shape share the first one's random weights (PEMN, section 3.3).

    Linear layers share as well; the released code, whose ConvMixer has one linear layer, lets
    convolutions share only.
    """
    return _drawn(density, fields, values="one_layer")


def max_layer_padding(density: float = 0.5, **fields: Any) -> MaskConfig:
    """Every layer takes its prefix of the largest layer's random weights, whose std it keeps (PEMN,
    section 3.3, MP).
    """
    return _drawn(density, fields, values="max_layer_padding")


def random_padding(
    ratio: float = 1e-2, density: float = 0.5, align: bool = False, **fields: Any
) -> MaskConfig:
    """One short random vector repeated through every layer (PEMN, section 3.4, RP).

    ``align=True`` moves the period to a near one with few distinct row patterns, the fast path; the
    paper's exact one is the default. ``mode="rand"`` permutes the repeated vector.
    """
    return _drawn(density, fields, values="random_padding", ratio=ratio, align=align)


def self_masking(threshold: float = 0.0) -> MaskConfig:
    """Threshold masks on a pretrained backbone, weights rescaled by 1 / sqrt(density) (Self-Masking
    Networks, section 3).
    """
    return MaskConfig(
        rule=Threshold(threshold, rescale=True),
        values="pretrained",
        score_init=1.0,
        train_norm=False,
    )


def piggyback() -> MaskConfig:
    """Threshold 5e-3 on scores that start at 1e-2, pretrained weights as they are (Piggyback)."""
    return MaskConfig(rule=Threshold(5e-3), values="pretrained", score_init=1e-2, train_norm=False)


def _drawn(density: float, fields: dict[str, Any], **own: Any) -> MaskConfig:
    return MaskConfig(**{"rule": TopK(density), **fields}, **own)
