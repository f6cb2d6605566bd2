"""Convolutions with a fixed mask."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_kernels as mk

from ..problem import Case, Problem, Provider, against_float64, channels_last
from ..providers import BF16_ERROR, compiled, conv_layer
from ._weights import masked_weight, values_name


@dataclass(frozen=True)
class MaskedConv2d(Case):
    """A masked convolution with padding ``kernel // 2``, float32, activations channels_last."""

    batch: int
    channels: int
    size: int
    outputs: int
    kernel: int
    groups: int = 1
    stride: int = 1
    ratio: float | None = 1e-2
    align: bool = False
    layer: str = ""
    group: ClassVar[str] = "masked_conv2d"

    @property
    def name(self) -> str:
        kind = "depthwise " if self.groups == self.channels else ""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        layer = f" ({self.layer})" if self.layer else ""
        return (
            f"masked_conv2d {kind}{self.kernel}x{self.kernel}{stride} "
            f"{self.channels}->{self.outputs} on {self.batch}x{self.size}x{self.size} "
            f"{values_name(self.ratio, self.align)}{layer}"
        )

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.channels, self.size, self.size)
        inputs = tuple(channels_last(torch.randn(size, generator=generator)) for _ in range(2))
        shape = (self.outputs, self.channels // self.groups, self.kernel, self.kernel)
        w = masked_weight(shape, self.ratio, self.align)
        weight, bits = channels_last(w.weight), channels_last(w.float_mask)
        masked = channels_last(w.masked)
        options: dict[str, Any] = {
            "padding": self.kernel // 2,
            "groups": self.groups,
            "stride": self.stride,
        }
        side = (self.size - 1) // self.stride + 1
        outputs = self.batch * self.outputs * side**2
        x_and_y = inputs[0].numel() + outputs

        def convolution(matrix: Tensor, element: int = 4, **settings: Any) -> Provider:
            moved = element * (matrix.numel() + x_and_y)
            return Provider(lambda x: F.conv2d(x, matrix, **options), moved=moved, **settings)

        return Problem(
            inputs,
            {
                "ours": lambda: Provider(
                    lambda x: mk.masked_conv2d(x, w.values, w.mask, backend=backend, **options),
                    moved=w.packed_bytes + 4 * x_and_y,
                ),
                "F.conv2d": lambda: convolution(masked),
                "F.conv2d NCHW": lambda: convolution(w.masked, prepare=Tensor.contiguous),
                "torch.compile": lambda: Provider(
                    compiled(conv_layer(masked, **options), inputs[0], frozen=True),
                    moved=4 * (masked.numel() + x_and_y),
                ),
                "F.conv2d(x, w * m)": lambda: Provider(
                    lambda x: F.conv2d(x, weight * bits, **options),
                    moved=4 * (4 * masked.numel() + x_and_y),
                ),
                "bf16": lambda: convolution(
                    masked.bfloat16(), 2, prepare=Tensor.bfloat16, lossy=BF16_ERROR
                ),
            },
            against_float64(
                lambda x: F.conv2d(x, masked, **options),
                lambda x: F.conv2d(x.contiguous(), w.masked.double(), **options),
            ),
            dense=("F.conv2d", "F.conv2d NCHW", "torch.compile"),
            multiply_adds=outputs * w.masked[0].numel(),
        )


SHORT = 1e-4
PAPER = 1e-2


def _pointwise(batch: int, dim: int, ratio: float, align: bool) -> MaskedConv2d:
    layer = f"ConvMixer-{dim}"
    return MaskedConv2d(batch, dim, 16, dim, 1, ratio=ratio, align=align, layer=layer)


def _depthwise(batch: int, dim: int) -> MaskedConv2d:
    layer = f"ConvMixer-{dim}"
    return MaskedConv2d(batch, dim, 16, dim, 5, groups=dim, layer=layer)


def _resnet(
    depth: int, channels: int, size: int, outputs: int, kernel: int, stride: int, align: bool
) -> MaskedConv2d:
    ratio = SHORT if align else PAPER
    layer = f"ResNet-{depth}"
    return MaskedConv2d(
        8, channels, size, outputs, kernel, stride=stride, ratio=ratio, align=align, layer=layer
    )


CASES = (
    *(_pointwise(64, dim, SHORT, align=True) for dim in (256, 512)),
    *(_pointwise(batch, 256, SHORT, align=True) for batch in (1, 8)),
    _pointwise(64, 256, PAPER, align=True),
    *(_pointwise(64, dim, PAPER, align=False) for dim in (256, 512)),
    *(_depthwise(batch, 256) for batch in (1, 64)),
    _depthwise(64, 512),
    *(
        _resnet(*shape, align)
        for shape in (
            (18, 64, 56, 64, 3, 1),
            (18, 256, 14, 256, 3, 1),
            (18, 256, 14, 512, 3, 2),
            (18, 512, 7, 512, 3, 1),
            (50, 256, 56, 64, 1, 1),
            (50, 1024, 14, 256, 1, 1),
            (50, 512, 7, 2048, 1, 1),
        )
        for align in (True, False)
    ),
)
"""ConvMixer on 16 x 16 patches; ResNets on images of 224 x 224."""

QUICK = (CASES[0], CASES[5], CASES[8], _resnet(18, 256, 14, 256, 3, 1, align=True))

TOY = (
    MaskedConv2d(2, 4, 5, 6, kernel=3, stride=2, layer="toy"),
    MaskedConv2d(2, 4, 5, 4, kernel=3, groups=4),
)
