"""Inference layers that hold bits and values only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..mask import PackedMask
from ..prototype import Prototype
from ._fixed import FixedMask, FixedMaskConv2d, FixedMaskLinear
from ._layer import FrozenLayer, LinearGeometry


class _PackedLayer(FixedMask):
    """Values and mask are frozen."""

    weight_scale: Tensor | None

    def _setup(
        self,
        weight: Tensor | Prototype,
        mask: PackedMask,
        bias: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        self.set_mask(mask)
        self.set_values(weight)
        self.register_buffer("weight_scale", scale)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def scale(self) -> Tensor | None:
        return self.weight_scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self._values_repr()}"


class PackedLinear(_PackedLayer, FixedMaskLinear):
    """``masked_linear`` with a fixed mask.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        weight: frozen values ``[out_features, in_features]`` or a Prototype; not copied.
        mask: PackedMask of shape ``(out_features, in_features)``.
        bias: ``[out_features]`` or None.
        scale: 0-d factor of the masked weight, or None for 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Tensor | Prototype,
        mask: PackedMask,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._setup(weight, mask, bias, scale)


class PackedConv2d(_PackedLayer, FixedMaskConv2d):
    """``masked_conv2d`` with a fixed mask.

    Args:
        in_channels, ..., padding_mode: as in ``nn.Conv2d``.
        weight: frozen values ``[out_channels, in_channels / groups, kh, kw]`` or a Prototype; not
            copied.
        mask: PackedMask of the weight's shape.
        bias: ``[out_channels]`` or None.
        scale: 0-d factor of the masked weight, or None for 1.
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
        padding_mode: str = "zeros",
        *,
        weight: Tensor | Prototype,
        mask: PackedMask,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        self._setup(weight, mask, bias, scale)


def pack_layer(layer: FrozenLayer) -> PackedLinear | PackedConv2d:
    """The packed form of a masked or pruned layer, same outputs; values and bias are shared."""
    kind: Any = PackedLinear if isinstance(layer, LinearGeometry) else PackedConv2d
    values = layer.values
    if isinstance(values, nn.Parameter) and values.requires_grad:
        values = values.detach()  # the same memory, frozen
    with torch.no_grad():
        packed = kind(
            **layer.geometry,
            weight=values,
            mask=layer.mask,
            bias=layer.bias,
            scale=layer.scale,
        )
    packed.train(layer.training)
    assert isinstance(packed, PackedLinear | PackedConv2d)
    return packed
