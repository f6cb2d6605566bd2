"""ResNet (He et al., "Deep Residual Learning for Image Recognition"), for CIFAR and ImageNet."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import FusedSequential
from .registry import register_model

STEMS = ("cifar", "imagenet")
SHORTCUTS = ("A", "B")
BLOCKS = {"basic": 1, "bottleneck": 4}
"""Kinds of block, and by what factor their output is wider than their 3x3 convolutions."""


class ResNet(nn.Module):
    """Stem, one stage of residual blocks for each of ``depths``, then mean and classifier.

    The first stage has ``width`` channels; each further one has twice as many and half the side.
    PEMN's code for this network was never released, so what its numbers leave open is an argument:

    - ``shortcut``: CIFAR ResNets default to A, as He et al. (section 4.2) define them and their
      counts are published; it holds nothing to mask. Edge-popup's code has B. The wider ResNets
      default to B, as everyone builds them.
    - ``norm_affine``: PEMN says to follow edge-popup, whose BatchNorm has no parameters; True is
      the ResNet of the literature, and what PEMN's ConvMixer does.
    - ``head_bias``: edge-popup's classifier has no bias, and so the default has none; published
      counts include it.

    Args:
        depths: blocks of each stage.
        width: channels of the first stage, inside its blocks.
        block: ``"basic"`` is two 3x3 convolutions; ``"bottleneck"`` is 1x1, 3x3 and 1x1, the last
            four times as wide.
        stem: ``"cifar"`` is a 3x3 convolution; ``"imagenet"`` is 7x7 of stride 2 and a max pool of
            stride 2.
        shortcut: where a block changes the shape: ``"A"`` takes every second pixel and appends
            channels of zeros; ``"B"`` is a 1x1 convolution and BatchNorm.
        norm_affine: give BatchNorm a trained weight and bias.
        head_bias: give the classifier a bias.
        num_classes, in_channels: of the task.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 3),
        width: int = 16,
        block: str = "basic",
        stem: str = "cifar",
        shortcut: str = "A",
        norm_affine: bool = True,
        head_bias: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("block", block, tuple(BLOCKS)),
            ("stem", stem, STEMS),
            ("shortcut", shortcut, SHORTCUTS),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        kernel_size, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.stem = FusedSequential(
            *_conv_norm(in_channels, width, kernel_size, stride, norm_affine),
            nn.ReLU(inplace=True),
        )
        if stem == "imagenet":
            self.stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        blocks: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                inner = width * 2**stage
                blocks.append(ResNetBlock(block, channels, inner, stride, shortcut, norm_affine))
                channels = inner * BLOCKS[block]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes, bias=head_bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to logits ``[B, num_classes]``."""
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))))
        return logits


class ResNetBlock(nn.Module):
    """``[B, in_channels, H, W]`` to ``[B, factor * width, H / stride, W / stride]``:
    ``relu(branch(x) + shortcut(x))``.
    """

    def __init__(
        self, kind: str, in_channels: int, width: int, stride: int, shortcut: str, affine: bool
    ) -> None:
        super().__init__()
        channels = width * BLOCKS[kind]
        if kind == "basic":
            self.branch = FusedSequential(
                *_conv_norm(in_channels, width, 3, stride, affine),
                nn.ReLU(inplace=True),
                *_conv_norm(width, width, 3, 1, affine),
            )
        else:
            self.branch = FusedSequential(
                *_conv_norm(in_channels, width, 1, 1, affine),
                nn.ReLU(inplace=True),
                *_conv_norm(width, width, 3, stride, affine),
                nn.ReLU(inplace=True),
                *_conv_norm(width, channels, 1, 1, affine),
            )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != in_channels:
            self.shortcut = (
                StridedPad(stride, channels - in_channels)
                if shortcut == "A"
                else nn.Sequential(*_conv_norm(in_channels, channels, 1, stride, affine))
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.branch(x, self.shortcut(x), self.activation)
        return result


class StridedPad(nn.Module):
    """``[B, C, H, W]`` to ``[B, C + extra, H / stride, W / stride]``: every ``stride``-th pixel and
    ``extra`` channels of zeros.
    """

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


def _conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, affine: bool
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )


register_model(ResNet, "resnet")
for blocks in (3, 5, 9):
    register_model(ResNet, f"resnet{6 * blocks + 2}", depths=(blocks,) * 3)
register_model(ResNet, "resnet18", depths=(2, 2, 2, 2), width=64, shortcut="B")
register_model(ResNet, "resnet34", depths=(3, 4, 6, 3), width=64, shortcut="B")
register_model(
    ResNet,
    "resnet50",
    depths=(3, 4, 6, 3),
    width=64,
    block="bottleneck",
    stem="imagenet",
    shortcut="B",
    num_classes=1000,
)
