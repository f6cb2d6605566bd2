"""Sequences of modules, and their packed form that runs a convolution and what follows as one."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _ops
from ..backends import AUTO
from ..prototype import Prototype
from .packed import PackedConv2d


class Residual(nn.Sequential):
    """``x + f(x)``, f being the modules in turn."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return y


class PackedSequential(nn.Sequential):
    """A Sequential or Residual that runs a packed convolution and what follows it as one op.

    What follows: BatchNorm2d, GELU or ReLU, BatchNorm2d, any of them or all; the addition of a
    Residual too. It does so on float32 images where the norms are in evaluation mode and no
    gradient is asked for (``torch.no_grad``, ``torch.inference_mode``); otherwise the modules run
    one by one. They are where they were, with their state, and a change to it counts at once. Hooks
    of modules that run as one are not called.

    Args:
        plain: the nn.Sequential or Residual; its modules are shared with it.
    """

    def __init__(self, plain: nn.Sequential) -> None:
        super().__init__(OrderedDict(plain._modules.items()))
        self.plain_type = type(plain)
        self.training = plain.training
        self._planned: tuple[nn.Module, ...] = ()
        self._plan: list[FusedConv2d | nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        """As the plain form; the result of a fused op is channels_last."""
        residual = x if issubclass(self.plain_type, Residual) else None
        steps = self._steps()
        y = x
        for step in steps:
            if not isinstance(step, FusedConv2d):
                y = step(y)
            elif not step.fits(y):
                for module in step.modules:
                    y = module(y)
            elif step is steps[-1] and residual is not None and step.keeps_shape(y, residual):
                return step(y, residual)
            else:
                y = step(y)
        return y if residual is None else residual + y

    def to_plain(self) -> nn.Sequential:
        """The Residual or nn.Sequential of the same modules."""
        plain = self.plain_type(OrderedDict(self._modules.items()))
        plain.training = self.training
        return plain

    def _steps(self) -> "list[FusedConv2d | nn.Module]":
        modules = tuple(self)
        if modules != self._planned:
            self._planned, self._plan = modules, list(plan(modules))
        return self._plan


def is_fusable(module: nn.Module) -> bool:
    """Whether packing should make ``module`` a PackedSequential."""
    return type(module) in (nn.Sequential, Residual) and any(
        isinstance(step, FusedConv2d) for step in plan(tuple(cast("nn.Sequential", module)))
    )


def plan(modules: tuple[nn.Module, ...]) -> "Iterator[FusedConv2d | nn.Module]":
    """The modules in turn, those that can run as one op together."""
    at = 0
    while at < len(modules):
        fused = FusedConv2d.of(modules[at:])
        yield modules[at] if fused is None else fused
        at += 1 if fused is None else len(fused.modules)


class FusedConv2d:
    """``PackedConv2d [BatchNorm2d] [GELU | ReLU] [BatchNorm2d]`` as ``masked_conv2d_fused``."""

    def __init__(
        self,
        modules: tuple[nn.Module, ...],
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
        self._reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        self._spare = [2 * p - r for p, r in zip(padding, self._reach, strict=True)]
        self._affine: tuple[Any, Tensor] | None = None

    @classmethod
    def of(cls, modules: tuple[nn.Module, ...]) -> "FusedConv2d | None":
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

    def fits(self, x: Tensor) -> bool:
        """Whether the modules may run as one on ``x``. What they refuse, they refuse themselves."""
        conv = self.conv
        if (
            x.dtype != torch.float32
            or x.dim() != 4
            or x.shape[1] != conv.in_channels
            or any(size + spare < 1 for size, spare in zip(x.shape[2:], self._spare, strict=True))
            or any(norm.training for norm in self._norms)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return False
        tensors = list(self._tensors())
        if any(t.dtype != torch.float32 or t.device != x.device for t in tensors):
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *tensors))

    def keeps_shape(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the result on ``x`` can take ``residual``."""
        conv = self.conv
        return (
            x.shape == residual.shape
            and x.dtype == residual.dtype
            and conv.in_channels == conv.out_channels
            and conv.stride == (1, 1)
            and self._spare == [0, 0]
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        y: Tensor = _ops.masked_conv2d_fused(
            x,
            _values(conv),
            conv.words,
            self.affine(),
            self.activation,
            residual,
            *self._geometry,
            AUTO,
        )
        return y

    def affine(self) -> Tensor:
        """Gain and shift before and after the activation, ``[4, N]``; folded anew after a change of
        what they are made of.
        """
        if torch.compiler.is_compiling():
            return self._fold()
        tensors = list(self._tensors())
        if any(t.is_inference() for t in tensors):  # has no version: a change would go unseen
            return self._fold()
        key = [(t.data_ptr(), t._version) for t in tensors]
        if self._affine is None or self._affine[0] != key:
            self._affine = key, self._fold()
        return self._affine[1]

    def _tensors(self) -> Iterable[Tensor]:
        """What the affine is made of, and the values."""
        conv = self.conv
        yield _values(conv)
        for tensor in (conv.bias, conv.scale):
            if tensor is not None:
                yield tensor
        for norm in self._norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                if tensor is not None:
                    yield tensor

    def _fold(self) -> Tensor:
        with torch.no_grad():
            conv = self.conv
            gain, shift = _fold_norm(self.before, conv)
            if conv.bias is not None:
                shift = shift + gain * conv.bias
            if conv.scale is not None:
                gain = gain * conv.scale
            return torch.stack([gain, shift, *_fold_norm(self.after, conv)]).float()


def _values(conv: PackedConv2d) -> Tensor:
    values = conv.values
    return values.values if isinstance(values, Prototype) else values


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
