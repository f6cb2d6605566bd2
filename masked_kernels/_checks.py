"""Input validation: each message names the argument, what came and what was expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_type(name: str, value: object, expected: type | tuple[type, ...]) -> None:
    if not isinstance(value, expected):
        names = " or ".join(
            t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,))
        )
        raise TypeError(f"{name}: got {type(value).__name__}, expected {names}")


def check_float(name: str, t: Tensor) -> None:
    check_type(name, t, Tensor)
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: got dtype {t.dtype}, expected one of {', '.join(map(str, FLOAT_DTYPES))}"
        )


def check_shape(name: str, t: Tensor, expected: Sequence[int]) -> None:
    if t.shape != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {tuple(expected)}")


def check_like(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as ``other``."""
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {t.dtype}, expected {other.dtype} as {other_name}")
    check_device(name, t, other_name, other)


def check_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name}: got device {t.device}, expected {other.device} as {other_name}")


def check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, expected a fraction from 0 to 1")


def pair(name: str, value: int | Sequence[int], minimum: int) -> list[int]:
    """``value`` as [height, width], each at least ``minimum``."""
    both = [value, value] if isinstance(value, int) else list(value)
    if len(both) != 2 or any(v < minimum for v in both):
        raise ValueError(
            f"{name}: got {value}, expected an integer or a pair of integers, at least {minimum}"
        )
    return both
