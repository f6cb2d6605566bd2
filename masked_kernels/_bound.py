"""Calls like the one before, without what needs doing only once.

Checks, autocast, and the choice of backend and kernel take tens of microseconds in Python, as long
as a small layer. They depend on everything but the numbers. So a mask keeps the last call that was
made with it, and the next one that differs in the numbers alone goes to the kernel at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backends import AUTO, requested
from .mask import PackedMask
from .prototype import Prototype

Run = Callable[[Tensor], Tensor]
Key = tuple[object, ...]

_TENSORS = (Tensor, nn.Parameter)
_OPTIONAL_TENSORS = (*_TENSORS, type(None))


class BoundCall(NamedTuple):
    """What computes the call of ``key`` from x; ``operands`` stay alive: their ids are in it."""

    key: Key
    run: Run
    operands: tuple[object, ...]


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
    """What checks and choices depend on; None for a call that a compiler, a mode, autocast or
    autograd needs to see, or whose arguments are not of the usual types.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(mask) is not PackedMask
        or type(x) not in _TENSORS
        or type(bias) not in _OPTIONAL_TENSORS
        or not (x.is_cpu or x.is_cuda)
        or torch.is_autocast_enabled(x.device.type)
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
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        id(values),
        words._version,
        id(bias),
        id(scale),
        geometry,
        requested(backend or AUTO),
    )


def find(mask: PackedMask, key: Key | None) -> Run | None:
    """What computes the call, if it is like the one before."""
    bound: BoundCall | None = mask._bound if key is not None else None
    return bound.run if bound is not None and bound.key == key else None


def keep(mask: PackedMask, key: Key, run: Run, operands: tuple[object, ...]) -> None:
    """Make of a call that was right the one before."""
    mask._bound = BoundCall(key, run, operands)
