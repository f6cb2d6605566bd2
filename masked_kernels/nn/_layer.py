"""What masked, pruned and packed layers share: values, geometry, and the way back to a plain torch
layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_shape, pair
from ..mask import PackedMask
from ..prototype import Prototype


class FrozenLayer(nn.Module):
    """Values under a mask, one of the two frozen or both: masked layers freeze the values, pruned
    layers the mask, packed layers both.

    The values are ``weight`` (dense) or ``prototype``; the other is None.
    """

    weight: nn.Parameter | None
    prototype: Prototype | None
    bias: nn.Parameter | None

    def set_values(self, values: Tensor | Prototype) -> None:
        """Use a dense weight (not copied) or a shared Prototype."""
        if isinstance(values, Prototype):
            self.register_parameter("weight", None)
            self.prototype = values
            return
        check_shape("weight", values, self.weight_shape)
        if not isinstance(values, nn.Parameter):
            values = nn.Parameter(values, requires_grad=False)
        self.weight = values
        self.prototype = None

    @property
    def values(self) -> Tensor | Prototype:
        """The dense weight or the prototype."""
        if self.prototype is not None:
            return self.prototype
        assert self.weight is not None
        return self.weight

    @property
    def held(self) -> Tensor:
        """The tensor that holds the values: the dense weight, or the prototype's vector."""
        values = self.values
        return values.values if isinstance(values, Prototype) else values

    @property
    def weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def geometry(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        raise NotImplementedError

    @property
    def mask(self) -> PackedMask:
        raise NotImplementedError

    @property
    def scale(self) -> Tensor | None:
        """0-d factor of the masked weight, or None for 1."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As ``nn.Module``'s, but the memory format of ``to()`` is for images: masks are of weights
        and scores in row-major order, so that in another one every use would copy them.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in self.parameters(recurse=False):
            if not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()
        return self

    def dense_weight(self) -> Tensor:
        """A new tensor ``scale * (weight ⊙ mask)`` of the weight's shape and dtype."""
        values = self.values
        dense = values.fill(self.weight_shape) if isinstance(values, Prototype) else values.detach()
        dense = torch.where(self.mask.unpack(), dense, 0)
        return dense if self.scale is None else dense * self.scale

    def to_plain(self) -> nn.Module:
        """The plain torch layer with the same outputs."""
        raise NotImplementedError

    def _values_repr(self) -> str:
        return "dense" if self.prototype is None else f"prototype of {self.prototype.period}"


class LinearGeometry(FrozenLayer):
    """The sizes of ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    def geometry(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    @staticmethod
    def geometry_of(layer: Any) -> dict[str, Any]:
        return {"in_features": layer.in_features, "out_features": layer.out_features}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def to_plain(self) -> nn.Module:
        return _with_weight(
            nn.Linear(**self.geometry, bias=self.bias is not None, device="meta"), self
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Conv2dGeometry(FrozenLayer):
    """The sizes, strides and padding of ``nn.Conv2d``."""

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
    ) -> None:
        super().__init__()
        # nn.Conv2d validates, and knows how a padding mode and "same" become numbers.
        plain = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = tuple(pair("kernel_size", kernel_size, 1))
        self.stride, self.padding, self.dilation = plain.stride, plain.padding, plain.dilation
        self.padding_mode = padding_mode
        self._padding_of_mode = plain._reversed_padding_repeated_twice

    @property
    def geometry(self) -> dict[str, Any]:
        return self.geometry_of(self)

    @staticmethod
    def geometry_of(layer: Any) -> dict[str, Any]:
        return {
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel_size": list(layer.kernel_size),
            "stride": list(layer.stride),
            "padding": layer.padding if isinstance(layer.padding, str) else list(layer.padding),
            "dilation": list(layer.dilation),
            "groups": layer.groups,
            "padding_mode": layer.padding_mode,
        }

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """x and the zero padding that the convolution itself is left to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._padding_of_mode, mode=self.padding_mode), (0, 0)

    def to_plain(self) -> nn.Module:
        return _with_weight(
            nn.Conv2d(**self.geometry, bias=self.bias is not None, device="meta"), self
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return f"{text}, bias={self.bias is not None}"


def _with_weight(plain: Any, layer: FrozenLayer) -> nn.Module:
    plain.weight = nn.Parameter(layer.dense_weight(), requires_grad=False)
    plain.bias = layer.bias
    plain.train(layer.training)
    assert isinstance(plain, nn.Module)
    return plain
