"""A packed convolution and what follows it, run as one op."""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _ops
from ..backends import AUTO
from ._watch import Watch
from .packed import PackedConv2d

_INTEGERS = (torch.int32, torch.int64)  # of words, and of the batches that a norm counts


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
        self._watch = Watch(modules)
        self._prepared: Operands | None = None

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
        operands = self.operands()
        if not self.fits(x, operands.device):
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

    def fits(self, x: Tensor, device: torch.device | None) -> bool:
        """Whether the modules, on ``device``, may run as one on ``x``. What they refuse, they
        refuse themselves.
        """
        if x.dtype != torch.float32 or x.dim() != 4 or x.device != device:
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
        return not any(t.requires_grad for t in (x, *self._watch.tensors()))

    def operands(self) -> "Operands":
        """Prepared anew after a change of what they are made of."""
        if torch.compiler.is_compiling():
            return self._prepare()  # of tensors that are no more than this trace
        if self._watch.has_changed() or self._prepared is None:
            self._prepared = self._prepare()
        return self._prepared

    def _prepare(self) -> "Operands":
        conv = self.conv
        one_kind = all(
            t.device == conv.words.device and t.dtype in (torch.float32, *_INTEGERS)
            for t in self._watch.tensors()
        )
        return Operands(
            conv.held, conv.words, self._fold(), conv.words.device if one_kind else None
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
class Operands:
    """What a fused convolution takes beside x."""

    values: Tensor
    words: Tensor
    affine: Tensor  # [4, N]: gain and shift before and after the activation
    device: torch.device | None  # None if the layer is not float32 on one device


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
