"""Calls like the one before, without what needs doing only once.

Checks, autocast, and the choice of backend and kernel take tens of microseconds in Python, as long
as a small layer. They depend on everything but the numbers. So a mask remembers the last call that
was made with it, and the next one that differs in the numbers alone goes to the kernel at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops
from .backends import AUTO, bind, requested
from .mask import PackedMask
from .prototype import Prototype

Key = tuple[Any, ...]

_TENSORS = (Tensor, nn.Parameter)
_OPTIONAL_TENSORS = (*_TENSORS, type(None))


@dataclass(slots=True)
class BoundCall:
    """The call of ``key``: its op takes x and ``operands``. ``run`` takes x alone, from the second
    call on. ``alive`` are the objects whose ids are in the key.
    """

    key: Key
    operands: tuple[Any, ...]
    alive: tuple[object, ...]
    run: Callable[[Tensor], Tensor] | None = None


def key_of(
    op: str,
    x: Tensor,
    weight: Tensor | Prototype,
    mask: PackedMask,
    bias: Tensor | None,
    scale: object,
    backend: str | None,
    geometry: object = None,
) -> Key | None:
    """What checks and choices depend on; None for a call that a compiler, a mode, a
    transform, autocast or autograd needs to see, or whose arguments are not of the usual types.
    """
    if (
        _ops.is_watched()
        or type(mask) is not PackedMask
        or type(x) not in _TENSORS
        or type(bias) not in _OPTIONAL_TENSORS
        or not (x.is_cpu or x.is_cuda)
        or torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")  # a device's type takes a µs
    ):
        return None
    # A module's own look-up of a buffer takes a microsecond.
    values = weight._buffers["values"] if isinstance(weight, Prototype) else weight
    words = mask.words
    if values is None or type(values) not in _TENSORS or words.is_inference():  # has no version
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return None
    return (
        op,
        requested(backend or AUTO),
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        id(values),
        words._version,
        id(bias),
        id(scale),
        geometry,
    )


def repeat(mask: PackedMask, key: Key, x: Tensor) -> Tensor | None:
    """The op's result, if the call is like the one before; x is as the op takes it."""
    call: BoundCall | None = mask._bound
    if call is None or call.key != key:
        return None
    if call.run is None:
        op, backend = call.key[:2]
        call.run = bind(op, backend, x, *call.operands)
    return call.run(x)


def remember(mask: PackedMask, key: Key | None, operands: tuple[Any, ...], *alive: object) -> None:
    """A call that was right; ``operands`` are the op's besides x."""
    if key is not None:
        mask._bound = BoundCall(key, operands, alive)
