"""Input validation: each message names the argument, what came and what was expected."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IntOrPair = int | Sequence[int]

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


def pair(name: str, value: IntOrPair, minimum: int) -> list[int]:
    """``value`` as [height, width], each at least ``minimum``."""
    both = [value, value] if isinstance(value, int) else list(value)
    if len(both) != 2 or any(v < minimum for v in both):
        raise ValueError(
            f"{name}: got {value}, expected an integer or a pair of integers, at least {minimum}"
        )
    return both


def check_operands(x: Tensor, values: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
    check_like("weight", values, "x", x)
    if bias is not None:
        check_type("bias", bias, Tensor)
        check_shape("bias", bias, shape[:1])
        check_like("bias", bias, "x", x)


def _check_weight(values: Tensor, source: str, shape: Sequence[int], dim: int) -> None:
    """``shape`` is that of the mask or scores; only a dense weight has a shape of its own."""
    if len(shape) != dim:
        raise ValueError(f"{source}: got shape {tuple(shape)}, expected {dim} dimensions")
    if values.dim() != 1:
        check_shape("weight", values, shape)


def check_linear(x: Tensor, values: Tensor, source: str, shape: Sequence[int]) -> None:
    _check_weight(values, source, shape, dim=2)
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected (..., {shape[1]}) for {source} {tuple(shape)}"
        )


def check_conv2d(
    x: Tensor,
    values: Tensor,
    source: str,
    shape: Sequence[int],
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
) -> tuple[Tensor, tuple[list[int], list[int], list[int], int]]:
    """x as the op takes it (batched, padded), and (stride, padding, dilation, groups)."""
    _check_weight(values, source, shape, dim=4)
    if x.dim() not in (3, 4):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, C, H, W) or (C, H, W)")
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    if groups < 1 or batch.shape[1] != shape[1] * groups or shape[0] % groups:
        raise ValueError(
            f"groups: got {groups} with {batch.shape[1]} channels and {source} {tuple(shape)}, "
            f"expected channels = groups * {shape[1]} and {shape[0]} outputs divisible by groups"
        )
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    batch, paddings = _resolve_padding(batch, padding, shape[2:], strides, dilations)
    for size, kernel, pad, gap in zip(batch.shape[2:], shape[2:], paddings, dilations, strict=True):
        if size + 2 * pad < gap * (kernel - 1) + 1:
            raise ValueError(
                f"x: got spatial size {tuple(batch.shape[2:])} with padding {tuple(paddings)}, "
                f"expected room for the kernel {tuple(shape[2:])} with dilation {tuple(dilations)}"
            )
    return batch, (strides, paddings, dilations, groups)


def _resolve_padding(
    x: Tensor,
    padding: IntOrPair | str,
    kernel: Sequence[int],
    stride: list[int],
    dilation: list[int],
) -> tuple[Tensor, list[int]]:
    """x and symmetric padding; ``"same"`` of an odd total pads x itself, right and bottom."""
    if not isinstance(padding, str):
        return x, pair("padding", padding, 0)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(
            f"padding: got {padding!r}, expected 'same', 'valid', an integer or a pair of integers"
        )
    if stride != [1, 1]:
        raise ValueError(f"padding: got 'same' with stride {tuple(stride)}, expected stride 1")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]
