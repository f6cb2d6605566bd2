"""The native library and how tensors reach it."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LIBRARY = Path(__file__).parents[2] / "_C.abi3.so"


@functools.cache
def why_unavailable() -> str | None:
    """None once the native library is loaded and its instruction set settled, else the reason."""
    if not _LIBRARY.exists():
        return (
            f"the native module {_LIBRARY.name} is not built: "
            "run `pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(_LIBRARY)
        native().isa()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{_LIBRARY.name}: {error}"
    return None


def native() -> Any:
    return torch.ops.masked_kernels_cpu


@functools.cache
def isa() -> str:
    name: str = native().isa()
    return name


def is_float(t: Tensor) -> bool:
    """Whether kernels read it as it is."""
    return t.dtype == torch.float32 and t.is_contiguous()


def as_float(t: Tensor) -> Tensor:
    # Conversions that do nothing still take a microsecond.
    return t if is_float(t) else t.float().contiguous()


def optional_float(t: Tensor | None) -> Tensor | None:
    return None if t is None else as_float(t)


def scaled_(t: Tensor, scale: Tensor | None) -> Tensor:
    return t if scale is None else t.mul_(scale)
