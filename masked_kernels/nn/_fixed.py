"""What layers with a fixed mask share: the packed mask as a buffer, and the forward."""

import torch
from torch import Tensor

from ..functional import masked_conv2d, masked_linear
from ..mask import PackedMask
from ._layer import Conv2dGeometry, FrozenLayer, LinearGeometry


class FixedMask(FrozenLayer):
    """``words`` (the packed mask) is a buffer."""

    words: Tensor
    _mask: PackedMask | None = None

    def set_mask(self, mask: PackedMask) -> None:
        if mask.shape != self.weight_shape:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {self.weight_shape}")
        self.register_buffer("words", mask.words)

    @property
    def mask(self) -> PackedMask:
        words = self._buffers["words"]  # a module's own look-up of it takes a microsecond
        assert words is not None
        if torch.compiler.is_compiling():
            return PackedMask(words, self.weight_shape)
        if self._mask is None or self._mask.words is not words:
            self._mask = PackedMask(words, self.weight_shape)  # kept for what it remembers of calls
        return self._mask


class FixedMaskLinear(FixedMask, LinearGeometry):
    """``masked_linear`` of the values."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return masked_linear(x, self.values, self.mask, self.bias, scale=self.scale)


class FixedMaskConv2d(FixedMask, Conv2dGeometry):
    """``masked_conv2d`` of the values."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to ``[B, out_channels, H', W']``."""
        x, padding = self.pad(x)
        return masked_conv2d(
            x,
            self.values,
            self.mask,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            scale=self.scale,
        )
