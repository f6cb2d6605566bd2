"""Sequences of modules, and their packed form that runs a convolution and what follows as one."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _ops
from ..backends import AUTO, bind, requested
from ._watch import Watch
from .fused_conv2d import FusedConv2d
from .sequential import FusedSequential, Residual


class PackedSequential(nn.Sequential):
    """A Sequential or Residual that runs a packed convolution and what follows it as one op.

    What follows: BatchNorm2d, GELU or ReLU, BatchNorm2d, any of them or all; the addition of a
    Residual too. It does so on float32 images where the norms are in evaluation mode and no
    gradient is asked for (``torch.no_grad``, ``torch.inference_mode``); otherwise the modules run
    one by one. They are where they were, with their state, and a change to it counts at once. Hooks
    of modules that run as one are not called.

    Several such ops in a row that keep the image's size are one op themselves
    (``masked_conv2d_chain``), which makes no new tensor for what lies between them.

    Args:
        plain: the nn.Sequential or Residual; its modules are shared with it.
    """

    def __init__(self, plain: nn.Sequential) -> None:
        super().__init__(OrderedDict(plain._modules.items()))
        self.plain_type = type(plain)
        self.training = plain.training
        self._planned: list[tuple[dict[str, nn.Module], list[nn.Module]]] = []
        self._steps: list[Step] = []
        self._chain: _Chain | None = None

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: nn.Module | None = None
    ) -> Tensor:
        """As the plain form; the result of a fused op is channels_last."""
        if not self._is_as_planned():
            self._planned, self._steps = list(_contents(self)), plan(self)
            self._chain = _Chain.of(self._steps)
        y = None if self._chain is None else self._chain(x)
        if y is None:
            y = _run(self._steps, x)
        if residual is not None:
            y = y + residual
        return y if activation is None else activation(y)

    def _is_as_planned(self) -> bool:
        return bool(self._planned) and all(
            list(modules.values()) == held for modules, held in self._planned
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which is made anew."""
        return {**self.__dict__, "_planned": [], "_steps": [], "_chain": None}

    def to_plain(self) -> nn.Sequential:
        """The Residual or nn.Sequential of the same modules."""
        plain = self.plain_type(OrderedDict(self._modules.items()))
        plain.training = self.training
        return plain


def is_fusable(module: nn.Module) -> bool:
    """Whether packing should make ``module`` a PackedSequential."""
    return type(module) in (nn.Sequential, FusedSequential, Residual) and _holds_fused(
        plan(cast("nn.Sequential", module))
    )


def _holds_fused(steps: "list[Step]") -> bool:
    return any(
        _holds_fused(step.steps) if isinstance(step, _Addition) else isinstance(step, FusedConv2d)
        for step in steps
    )


def plan(sequence: nn.Sequential) -> "list[Step]":
    """What to run in turn: the modules, also those of sequences inside, that can run as one op
    together, and the others.
    """
    steps: list[Step] = []
    modules = list(sequence)
    while modules:
        if _is_sequence(modules[0]):
            steps += plan(cast("nn.Sequential", modules.pop(0)))
        elif fused := FusedConv2d.of(modules):
            steps.append(fused)
            del modules[: len(fused.modules)]
        else:
            steps.append(modules.pop(0))
    if not _is_residual(sequence):
        return steps
    if len(steps) == 1 and isinstance(steps[0], FusedConv2d) and steps[0].can_add_input():
        steps[0].adds_input = True
        return steps
    return [_Addition(steps)]


class _Addition:
    """The steps of a Residual that is no single op."""

    def __init__(self, steps: "list[Step]") -> None:
        self.steps = steps

    def __call__(self, x: Tensor) -> Tensor:
        return x + _run(self.steps, x)


def _run(steps: "list[Step]", x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _is_sequence(module: nn.Module) -> bool:
    kinds = (nn.Sequential, FusedSequential, Residual, PackedSequential)
    return getattr(type(module), "forward", None) in [kind.forward for kind in kinds]


def _is_residual(sequence: nn.Sequential) -> bool:
    kind = sequence.plain_type if isinstance(sequence, PackedSequential) else type(sequence)
    return issubclass(kind, Residual)


def _contents(
    sequence: nn.Sequential,
) -> Iterator[tuple[dict[str, nn.Module], list[nn.Module]]]:
    """What the plan of ``sequence`` depends on: the modules of it and of sequences inside, in a
    dictionary that will show changes and as they are.
    """
    yield sequence._modules, list(sequence._modules.values())
    for module in sequence._modules.values():
        if isinstance(module, nn.Sequential):
            yield from _contents(module)


class _Chain:
    """Several steps as ``masked_conv2d_chain``; those after the first keep the image's size."""

    def __init__(self, steps: list[FusedConv2d]) -> None:
        self._steps = steps
        self._watch = Watch([module for step in steps for module in step.modules])
        self._operands: tuple[Any, ...] | None = None  # None where the steps cannot be one op
        self._device: torch.device | None = None
        self._run: Callable[[Tensor], Tensor] | None = None  # for calls like that of _key
        self._key: tuple[Any, ...] = ()

    @classmethod
    def of(cls, steps: "list[Step]") -> "_Chain | None":
        """None where the steps are no chain."""
        fused = [step for step in steps if isinstance(step, FusedConv2d)]
        if not fused or len(fused) < len(steps):
            return None
        for before, step in itertools.pairwise(fused):
            if step.conv.in_channels != before.conv.out_channels or not step.keeps_size():
                return None
        return cls(fused)

    def __call__(self, x: Tensor) -> Tensor | None:
        """None where the steps cannot be one op."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self._watch.has_changed():
            self._prepare()
        if self._operands is None or not self._steps[0].fits(x, self._device):
            return None
        if _ops.is_watched() or type(x) not in (Tensor, nn.Parameter):
            y: Tensor = _ops.masked_conv2d_chain(x, *self._operands, AUTO)
            return y
        key = (requested(), x.shape, x.stride())
        if self._run is None or self._key != key:
            self._run = bind("masked_conv2d_chain", AUTO, x, *self._operands)
            self._key = key
        return self._run(x)

    def _prepare(self) -> None:
        self._operands = self._run = None
        operands = [step.operands() for step in self._steps]
        self._device = operands[0].device
        if any(step.trains() for step in self._steps) or any(
            each.device != self._device for each in operands
        ):
            return
        self._operands = (
            [each.values for each in operands],
            [each.words for each in operands],
            [each.affine for each in operands],
            [step.activation for step in self._steps],
            [step.adds_input for step in self._steps],
            [size for step in self._steps for size in step.flat_geometry],
        )


Step = FusedConv2d | _Addition | nn.Module
