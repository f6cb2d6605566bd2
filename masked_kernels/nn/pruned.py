"""Layers with a fixed mask and trained weights: a pruned network's."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..mask import PackedMask
from ._fixed import FixedMask, FixedMaskConv2d, FixedMaskLinear


class _PrunedLayer(FixedMask):
    """``weight`` is a trained parameter, 0 where the mask drops it.

    A dropped weight gets a gradient of exactly 0, so that no optimizer moves it and weight decay
    leaves it at 0; and whatever it held would not count.
    """

    weight: nn.Parameter

    def _setup(
        self, bias: bool, mask: PackedMask, weight: Tensor | None, device: Any, dtype: Any
    ) -> None:
        self.set_mask(mask if device is None else mask.to(device))
        drawn = weight is None
        if weight is None:
            weight = torch.empty(self.weight_shape, device=device, dtype=dtype)
        self.set_values(weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.weight_shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if drawn:
            self.reset_parameters()
        else:
            self._drop()
            self._reset_bias()

    def reset_parameters(self) -> None:
        """Draw weight and bias afresh, as ``nn.Linear`` and ``nn.Conv2d`` do; the mask stays."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self._drop()
        self._reset_bias()

    def _drop(self) -> None:
        with torch.no_grad():
            self.weight.masked_fill_(~self.mask.unpack(), 0)

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = 1 / math.sqrt(max(math.prod(self.weight_shape[1:]), 1))
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def scale(self) -> None:
        return None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.mask.count()} of {self.weight.numel()}"


class PrunedLinear(_PrunedLayer, FixedMaskLinear):
    """``nn.Linear`` that trains the weights its mask keeps (``masked_linear``).

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        mask: PackedMask of shape ``(out_features, in_features)``.
        weight: ``[out_features, in_features]``, not copied, set to 0 where the mask drops it; None
            draws as ``nn.Linear`` does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        mask: PackedMask,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._setup(bias, mask, weight, device, dtype)


class PrunedConv2d(_PrunedLayer, FixedMaskConv2d):
    """``nn.Conv2d`` that trains the weights its mask keeps (``masked_conv2d``).

    Args:
        in_channels, ..., padding_mode, device, dtype: as in ``nn.Conv2d``.
        mask: PackedMask of shape ``(out_channels, in_channels / groups, kh, kw)``.
        weight: of that shape, not copied, set to 0 where the mask drops it; None draws as
            ``nn.Conv2d`` does.
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
        mask: PackedMask,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        self._setup(bias, mask, weight, device, dtype)


def prune_layer(plain: nn.Linear | nn.Conv2d, mask: PackedMask) -> PrunedLinear | PrunedConv2d:
    """The pruned form of a plain layer, whose weight (0 where dropped from now on) and bias it
    takes over.
    """
    kind: Any = PrunedLinear if isinstance(plain, nn.Linear) else PrunedConv2d
    geometry = kind.geometry_of(plain)
    layer = kind(**geometry, bias=False, mask=mask, weight=plain.weight)
    layer.bias = plain.bias
    layer.train(plain.training)
    assert isinstance(layer, PrunedLinear | PrunedConv2d)
    return layer
