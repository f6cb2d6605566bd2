"""The papers' recipes as MaskConfig presets."""

from .nn.config import MaskConfig
from .rules import Threshold, TopK


def edge_popup(density: float = 0.5) -> MaskConfig:
    """Random weights, top-k masks (edge-popup; "Mask" in PEMN, section 4.2)."""
    return MaskConfig(rule=TopK(density), values="random")


def one_layer(density: float = 0.5) -> MaskConfig:
    """Layers of equal shape share the first one's random weights (PEMN, section 3.3)."""
    return MaskConfig(rule=TopK(density), values="one_layer")


def max_layer_padding(density: float = 0.5) -> MaskConfig:
    """Every layer takes its prefix of the largest layer's random weights, whose std it keeps (PEMN,
    section 3.3, MP).
    """
    return MaskConfig(rule=TopK(density), values="max_layer_padding")


def random_padding(ratio: float = 1e-2, density: float = 0.5, align: bool = False) -> MaskConfig:
    """One short random vector repeated through every layer (PEMN, section 3.4, RP).

    ``align=True`` moves the period to a near one with few distinct row patterns, the fast path; the
    paper's exact one is the default.
    """
    return MaskConfig(rule=TopK(density), values="random_padding", ratio=ratio, align=align)


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
