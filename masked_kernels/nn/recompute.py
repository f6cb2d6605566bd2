"""Outputs of ``gelu_batch_norm`` made anew in the backward, in place of being kept for it."""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import _ops

_made: "ContextVar[_Made | None]" = ContextVar("_made", default=None)


@contextlib.contextmanager
def recompute_norms() -> Iterator[None]:
    """Run forwards with less memory: what a layer keeps of an input that ``FusedSequential`` made
    of GELU and BatchNorm is how to make it, not the input.

    The layer before the norm keeps that one's input already, so of two images a block only one
    remains, for one more pass over it in the backward. The backward may run outside. Gradients are
    the same to the bit. Elsewhere, as under ``torch.compile``, which runs layers one by one,
    nothing changes.
    """
    made = _Made()
    token = _made.set(made)
    try:
        with saved_tensors_hooks(made.pack, lambda kept: kept.make()):
            yield
    finally:
        _made.reset(token)


def remember(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Note how ``y`` was made, by ``gelu_batch_norm`` with this bias and residual."""
    made = _made.get()
    if made is not None and y.grad_fn is not None:
        kept = tuple(None if t is None else made.pack(t) for t in (bias, residual))
        made.outputs[_memory(y)] = _Output(weakref.ref(y), _Recipe(y.grad_fn, *kept))


@dataclass(frozen=True)
class _Kept:
    """A tensor, and its version when it was saved."""

    tensor: Tensor
    version: int

    def make(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward needs was changed in place since the forward: got "
                f"version {self.tensor._version}, expected {self.version}"
            )
        return self.tensor


@dataclass(frozen=True)
class _Recipe:
    """How to make an output again: the node of the graph that has the rest of its inputs."""

    node: Any
    bias: "_Kept | _Recipe | None"
    residual: "_Kept | _Recipe | None"

    @torch.no_grad()
    def make(self) -> Tensor:
        x, weight, stats = self.node.saved_tensors
        bias, residual = (kept and kept.make() for kept in (self.bias, self.residual))
        y: Tensor = _ops.gelu_batch_norm(
            x, stats, weight, bias, residual, self.node.eps, self.node.backend
        )
        return y


class _Output(NamedTuple):
    y: "weakref.ref[Tensor]"
    recipe: _Recipe

    def is_in(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` holds the output, as it was made; its memory may have passed on to
        another one.
        """
        y = self.y()
        return (
            y is not None
            and _memory(y) == _memory(tensor)
            and y._version == 0
            and (y.shape, y.stride()) == (tensor.shape, tensor.stride())
        )


class _Made:
    """Outputs of a forward, by their memory."""

    def __init__(self) -> None:
        self.outputs: dict[int, _Output] = {}

    def pack(self, tensor: Tensor) -> _Kept | _Recipe:
        output = self.outputs.get(_memory(tensor))
        if output is not None and output.is_in(tensor):
            return output.recipe
        return _Kept(tensor, tensor._version)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
