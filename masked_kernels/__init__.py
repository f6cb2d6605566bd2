"""Masked neural networks: frozen weights, one trained bit per weight, and kernels that use the bits
as they are.
"""

from . import models, nn, pruning, recipes
from .backends import BackendError, backends, use_backend
from .functional import (
    masked_conv2d,
    masked_linear,
    scored_conv2d,
    scored_linear,
)
from .mask import PackedMask
from .nn import ConversionReport, mask_model_, materialize_, pack_model_, summary
from .nn.config import MaskConfig
from .norm import batch_norm_relu, gelu_batch_norm
from .prototype import Prototype, prototype_period
from .rules import NM, Rule, Threshold, TopK
from .storage import FormatError, SizeReport, load_masked, save_masked

__version__ = "0.1.0"

__all__ = [
    "NM",
    "BackendError",
    "ConversionReport",
    "FormatError",
    "MaskConfig",
    "PackedMask",
    "Prototype",
    "Rule",
    "SizeReport",
    "Threshold",
    "TopK",
    "backends",
    "batch_norm_relu",
    "gelu_batch_norm",
    "load_masked",
    "mask_model_",
    "masked_conv2d",
    "masked_linear",
    "materialize_",
    "models",
    "nn",
    "pack_model_",
    "prototype_period",
    "pruning",
    "recipes",
    "save_masked",
    "scored_conv2d",
    "scored_linear",
    "summary",
    "use_backend",
]
