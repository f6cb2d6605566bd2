"""Calls like the one before, without what needs doing only once.

Checks, autocast, and the choice of backend and kernel take tens of microseconds in Python, as long
as a small layer. They depend on everything but the numbers. So a mask remembers the last call that
was made with it, and the next one that differs in the numbers alone goes to the kernel at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops
from .backends import AUTO, bind, requested
from .mask import PackedMask
from .prototype import Prototype

Call = tuple[str, Tensor, Tensor | Prototype, PackedMask, Tensor | None, object, str | None, object]
"""The op of a call and what it was made with: x, weight, mask, bias, scale, backend, geometry."""

_TENSORS = (Tensor, nn.Parameter)
_OPTIONAL_TENSORS = (*_TENSORS, type(None))


@dataclass(slots=True)
class BoundCall:
    """A call that was right: its op, what checks and choices depend on, and the op's ``operands``
    besides x. ``run`` takes x alone, from the second call on.
    """

    op: str
    backend: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    weight: Tensor | Prototype
    values: Tensor
    bias: Tensor | None
    scale: object
    words_version: int
    geometry: object
    operands: tuple[Any, ...]
    run: Callable[[Tensor], Tensor] | None = None


def repeat(asked: Call) -> Tensor | None:
    """The op's result, if the call is like the one before."""
    op, x, weight, mask, bias, scale, backend, geometry = asked
    if torch.compiler.is_compiling() or type(mask) is not PackedMask:
        return None
    # The cheap questions first: on a small layer each costs a hundredth of the time.
    call: BoundCall | None = mask._bound
    if (
        call is None
        or call.weight is not weight
        or call.bias is not bias
        or call.scale is not scale
        or call.op != op
        or call.geometry != geometry
        or call.backend != requested(backend or AUTO)
        or type(x) not in _TENSORS
        or call.dtype != x.dtype
        or call.shape != x.shape
        or call.stride != x.stride()
        or call.device != x.device
        or call.words_version != mask.words._version
        or call.values is not _values(weight)
        or _needs_more(x, call.values, bias)
    ):
        return None
    if call.run is None:
        call.run = _bind(call, x)
    return call.run(x)


def remember(asked: Call, operands: tuple[Any, ...]) -> None:
    """A call that was right, unless no other may be made like it; ``operands`` are its op's besides
    x.
    """
    op, x, weight, mask, bias, scale, backend, geometry = asked
    if torch.compiler.is_compiling() or type(mask) is not PackedMask:
        return
    values, words = _values(weight), mask.words
    if (
        values is None
        or type(x) not in _TENSORS
        or type(values) not in _TENSORS
        or type(bias) not in _OPTIONAL_TENSORS
        or not (x.is_cpu or x.is_cuda)
        or words.is_inference()  # has no version
        or _needs_more(x, values, bias)
    ):
        return
    mask._bound = BoundCall(
        op,
        requested(backend or AUTO),
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        weight,
        values,
        bias,
        scale,
        words._version,
        geometry,
        operands,
    )


def _bind(call: BoundCall, x: Tensor) -> Callable[[Tensor], Tensor]:
    if call.op == "masked_conv2d" or x.dim() == 2:
        return bind(call.op, call.backend, x, *call.operands)
    *lead, cols = x.shape
    tokens = (math.prod(lead), cols)
    run = bind(call.op, call.backend, x.reshape(tokens), *call.operands)

    def run_tokens(x: Tensor) -> Tensor:
        y: Tensor = run(x.reshape(tokens))
        return y.view(*lead, y.shape[1])

    return run_tokens


def _values(weight: Tensor | Prototype) -> Tensor | None:
    # A module's own look-up of a buffer takes a microsecond.
    return weight._buffers["values"] if isinstance(weight, Prototype) else weight


def _needs_more(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether a mode, a transform, autocast or autograd needs to see the call."""
    return (
        _ops.is_watched()
        or torch._C._is_any_autocast_enabled()
        or (
            torch.is_grad_enabled()
            and (
                x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
            )
        )
    )
