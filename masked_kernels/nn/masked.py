"""Trainable masked layers: frozen values, one trained score per weight."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import scored_conv2d, scored_linear
from ..mask import PackedMask
from ..prototype import Prototype
from ..rules import Rule, Selected, TopK
from ._layer import Conv2dGeometry, FrozenLayer, LinearGeometry


class _MaskedLayer(FrozenLayer):
    """The trained half: ``scores`` is a parameter of the weight's shape, ``rule`` turns it into the
    mask.
    """

    scores: nn.Parameter
    rule: Rule
    selected: Selected | None = None
    """What ``select_together`` found and the forward uses."""
    holds_all_scores: ClassVar[bool] = True
    """False for a layer that holds some rows and selects with other processes."""

    def _setup(
        self,
        bias: bool,
        rule: Rule | None,
        weight: Tensor | Prototype | None,
        device: Any,
        dtype: Any,
    ) -> None:
        self.rule = TopK() if rule is None else rule
        if weight is None:
            weight = torch.empty(self.weight_shape, device=device, dtype=dtype)
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        self.set_values(weight)
        self.scores = nn.Parameter(torch.empty(self.weight_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.weight_shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw scores (kaiming uniform, a = sqrt(5)) and bias (as nn.Linear) afresh; the frozen
        values stay.
        """
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        if self.bias is not None:
            fan_in = max(math.prod(self.weight_shape[1:]), 1)
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @property
    def mask(self) -> PackedMask:
        """The mask that the scores select now."""
        return self.rule(self.scores)

    @property
    def scale(self) -> Tensor | None:
        return self.rule.weight_scale(self.mask.words, self.scores.numel())

    def smallest_kept(self) -> float | None:
        """The smallest score kept, of their magnitudes if the rule ranks those; None if none is."""
        scores = self.scores.detach()
        kept = (scores.abs() if self.rule.absolute else scores)[self.mask.unpack()]
        return kept.min().item() if len(kept) else None

    def scores_and_rule(self) -> tuple[Tensor, Rule]:
        """What the forward ranks, and how. ``distributed`` has layers that keep neither whole."""
        return self.scores, self.selected or self.rule

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule}, weight={self._values_repr()}"


class MaskedLinear(_MaskedLayer, LinearGeometry):
    """``nn.Linear`` with a frozen weight and a trained mask (``scored_linear``).

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        rule: turns scores into the mask; None for ``TopK(0.5)``.
        weight: frozen values ``[out_features, in_features]`` or a Prototype (neither is copied);
            None draws kaiming normal.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rule: Rule | None = None,
        weight: Tensor | Prototype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._setup(bias, rule, weight, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return scored_linear(x, self.values, *self.scores_and_rule(), self.bias)


class MaskedConv2d(_MaskedLayer, Conv2dGeometry):
    """``nn.Conv2d`` with a frozen weight and a trained mask (``scored_conv2d``).

    Args:
        in_channels, ..., padding_mode, device, dtype: as in ``nn.Conv2d``.
        rule: turns scores into the mask; None for ``TopK(0.5)``.
        weight: frozen values ``[out_channels, in_channels / groups, kh, kw]`` or a Prototype
            (neither is copied); None draws kaiming normal.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rule: Rule | None = None,
        weight: Tensor | Prototype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        self._setup(bias, rule, weight, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_channels, H', W']``."""
        x, padding = self.pad(x)
        return scored_conv2d(
            x,
            self.values,
            *self.scores_and_rule(),
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
