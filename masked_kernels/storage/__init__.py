"""Saving a masked model: one safetensors file of what it needs to predict (docs/format.md)."""

from .codecs import CODECS
from .format import FormatError
from .inspect import FileSummary, inspect_file
from .load import load_masked
from .report import SizeReport
from .save import save_masked

__all__ = [
    "CODECS",
    "FileSummary",
    "FormatError",
    "SizeReport",
    "inspect_file",
    "load_masked",
    "save_masked",
]
