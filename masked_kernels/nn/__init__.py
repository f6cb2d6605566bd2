"""Masked modules, packed modules, and conversion between them and plain torch modules."""

from .compact import CompactLinear
from .convert import ConversionReport, mask_model_, materialize_, pack_model_
from .masked import MaskedConv2d, MaskedLinear
from .packed import PackedConv2d, PackedLinear
from .packed_sequential import PackedSequential
from .pruned import PrunedConv2d, PrunedLinear
from .recompute import recompute_norms
from .sequential import FusedSequential, Residual
from .summary import Summary, summary
from .together import select_together

__all__ = [
    "CompactLinear",
    "ConversionReport",
    "FusedSequential",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedConv2d",
    "PackedLinear",
    "PackedSequential",
    "PrunedConv2d",
    "PrunedLinear",
    "Residual",
    "Summary",
    "mask_model_",
    "materialize_",
    "pack_model_",
    "recompute_norms",
    "select_together",
    "summary",
]
