"""Sequences of modules, and their packed form that runs a convolution and what follows as one."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _ops
from ..backends import AUTO
from ..prototype import Prototype
from .packed import PackedConv2d
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
        self._planned: list[nn.Module] = []
        self._plan: list[Step] = []

    def forward(self, x: Tensor) -> Tensor:
        """As the plain form; the result of a fused op is channels_last."""
        steps = self._steps()
        y = _chain(steps, x)
        return _run(steps, x) if y is None else y

    def to_plain(self) -> nn.Sequential:
        """The Residual or nn.Sequential of the same modules."""
        plain = self.plain_type(OrderedDict(self._modules.items()))
        plain.training = self.training
        return plain

    def _steps(self) -> "list[Step]":
        modules = list(_flat(self))
        if modules != self._planned:
            self._planned, self._plan = modules, plan(self)
        return self._plan


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


def _flat(sequence: nn.Sequential) -> Iterator[nn.Module]:
    """All that the plan of ``sequence`` depends on."""
    for module in sequence._modules.values():
        assert module is not None
        yield module
        if isinstance(module, nn.Sequential):
            yield from _flat(module)


def _chain(steps: "list[Step]", x: Tensor) -> Tensor | None:
    """The steps as one op: fused ones that fit x, those after the first keeping its size. None
    where they are not such.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(steps) < 2:
        return None
    channels = x.shape[1] if x.dim() == 4 else 0
    operands: list[_Operands] = []
    for step in steps:
        if not isinstance(step, FusedConv2d) or step.conv.in_channels != channels:
            return None
        channels = step.conv.out_channels
        prepared = step._operands()
        if operands:
            fits = step.keeps_size() and not step.trains() and prepared.device == x.device
        else:
            fits = step._fits(x, prepared)
        if not fits:
            return None
        operands.append(prepared)
    fused = cast("list[FusedConv2d]", steps)
    y: Tensor = _ops.masked_conv2d_chain(
        x,
        [each.values for each in operands],
        [each.words for each in operands],
        [each.affine for each in operands],
        [step.activation for step in fused],
        [step.adds_input for step in fused],
        [size for step in fused for size in step.flat_geometry],
        AUTO,
    )
    return y


class FusedConv2d:
    """``PackedConv2d [BatchNorm2d] [GELU | ReLU] [BatchNorm2d]`` as ``masked_conv2d_fused``.

    ``adds_input`` makes it a Residual of them.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        before: nn.BatchNorm2d | None,
        activation: str,
        after: nn.BatchNorm2d | None,
        padding: list[int],
    ) -> None:
        self.modules = modules
        self.conv = conv = cast("PackedConv2d", modules[0])
        self.before, self.activation, self.after = before, activation, after
        self._norms = [norm for norm in (before, after) if norm is not None]
        self._geometry = (
            list(conv.kernel_size),
            list(conv.stride),
            padding,
            list(conv.dilation),
            conv.groups,
        )
        *pairs, groups = self._geometry
        self.flat_geometry = [*itertools.chain(*pairs), groups]
        self._reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        self._spare = [2 * p - r for p, r in zip(padding, self._reach, strict=True)]
        self.adds_input = False
        self._key: list[Any] = []
        self._prepared: _Operands | None = None

    @classmethod
    def of(cls, modules: list[nn.Module]) -> "FusedConv2d | None":
        """The longest fusable beginning of ``modules``, None if there is none."""
        conv = modules[0]
        if type(conv) is not PackedConv2d or conv.padding_mode != "zeros":
            return None
        padding = _padding(conv)
        if padding is None:
            return None
        count = 1

        def take_norm() -> nn.BatchNorm2d | None:
            nonlocal count
            norm = modules[count] if count < len(modules) else None
            if (
                type(norm) is not nn.BatchNorm2d
                or not norm.track_running_stats
                or norm.num_features != conv.out_channels
            ):
                return None
            count += 1
            return norm

        before = take_norm()
        activation = _activation(modules[count]) if count < len(modules) else "identity"
        count += activation != "identity"
        after = take_norm()
        return None if count == 1 else cls(modules[:count], before, activation, after, padding)

    def trains(self) -> bool:
        return any(norm.training for norm in self._norms)

    def keeps_size(self) -> bool:
        """Whether the result has the height and width of the input."""
        return self.conv.stride == (1, 1) and self._spare == [0, 0]

    def can_add_input(self) -> bool:
        """Whether the result has the shape of the input."""
        return self.conv.in_channels == self.conv.out_channels and self.keeps_size()

    def __call__(self, x: Tensor) -> Tensor:
        operands = self._operands()
        if not self._fits(x, operands):
            alone = x
            for module in self.modules:
                alone = module(alone)
            return x + alone if self.adds_input else alone
        y: Tensor = _ops.masked_conv2d_fused(
            x,
            operands.values,
            operands.words,
            operands.affine,
            self.activation,
            x if self.adds_input else None,
            *self._geometry,
            AUTO,
        )
        return y

    def _fits(self, x: Tensor, operands: "_Operands") -> bool:
        """Whether the modules may run as one on ``x``. What they refuse, they refuse themselves."""
        if x.dtype != torch.float32 or x.dim() != 4 or x.device != operands.device:
            return False
        _, channels, height, width = x.shape
        if channels != self.conv.in_channels or self.trains():
            return False
        if height + self._spare[0] < 1 or width + self._spare[1] < 1:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        if not torch.is_grad_enabled():
            return True
        return not any(t.requires_grad for t in (x, *self._tensors()))

    def _operands(self) -> "_Operands":
        """Prepared anew after a change of what they are made of."""
        tensors = self._tensors()
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return self._prepare(tensors)  # such tensors have no version: a change would go unseen
        key: list[Any] = [(t.data_ptr(), t._version) for t in tensors]
        key += [norm.eps for norm in self._norms]
        if self._prepared is None or self._key != key:
            self._key, self._prepared = key, self._prepare(tensors)
        return self._prepared

    def _tensors(self) -> list[Tensor]:
        """All state of the modules, read past the slow ``nn.Module.__getattr__``."""
        conv = self.conv
        tensors = [_values(conv), *conv._buffers.values(), conv._parameters["bias"]]
        for norm in self._norms:
            tensors += norm._parameters.values()
            tensors += (norm._buffers["running_mean"], norm._buffers["running_var"])
        return [t for t in tensors if t is not None]

    def _prepare(self, tensors: list[Tensor]) -> "_Operands":
        conv = self.conv
        one_kind = all(
            t.device == conv.words.device and (t is conv.words or t.dtype == torch.float32)
            for t in tensors
        )
        return _Operands(
            _values(conv), conv.words, self._fold(), conv.words.device if one_kind else None
        )

    def _fold(self) -> Tensor:
        with torch.no_grad():
            conv = self.conv
            gain, shift = _fold_norm(self.before, conv)
            if conv.bias is not None:
                shift = shift + gain * conv.bias
            if conv.scale is not None:
                gain = gain * conv.scale
            return torch.stack([gain, shift, *_fold_norm(self.after, conv)]).float()


@dataclass(frozen=True)
class _Operands:
    values: Tensor
    words: Tensor
    affine: Tensor  # [4, N]: gain and shift before and after the activation
    device: torch.device | None  # None if the layer is not float32 on one device


def _values(conv: PackedConv2d) -> Tensor:
    values = conv.values
    return values.values if isinstance(values, Prototype) else values


Step = FusedConv2d | _Addition | nn.Module


def _fold_norm(norm: nn.BatchNorm2d | None, conv: PackedConv2d) -> tuple[Tensor, Tensor]:
    """Gain and shift, float64, of a norm by its running statistics."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": conv.words.device}
    one = torch.ones(conv.out_channels, **options)
    if norm is None:
        return one, torch.zeros_like(one)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight
    shift = -gain * norm.running_mean
    return gain, shift if norm.bias is None else shift + norm.bias


def _activation(module: nn.Module) -> str:
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return "relu" if type(module) is nn.ReLU else "identity"


def _padding(conv: PackedConv2d) -> list[int] | None:
    """On both sides of each dimension; None if ``"same"`` needs more on one."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]
