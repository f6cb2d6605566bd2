"""Masked neural networks: frozen weights, one trained bit per weight, and kernels that use the bits as they are."""

from .backends import BackendError, backends, use_backend
from .functional import masked_conv2d, masked_linear, scored_conv2d, scored_linear
from .mask import PackedMask
from .prototype import Prototype, prototype_period
from .rules import NM, Rule, Threshold, TopK

__version__ = "0.1.0"

__all__ = [
    "NM",
    "BackendError",
    "PackedMask",
    "Prototype",
    "Rule",
    "Threshold",
    "TopK",
    "backends",
    "masked_conv2d",
    "masked_linear",
    "prototype_period",
    "scored_conv2d",
    "scored_linear",
    "use_backend",
]
