"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?") as PEMN trains it: no biases, GELU
before BatchNorm.
"""

from typing import Any

from torch import Tensor, nn

from ..nn import FusedSequential, Residual
from .registry import register_model


class ConvMixer(nn.Module):
    """Patch embedding, then ``depth`` blocks of a residual depthwise and a pointwise convolution,
    then mean and classifier.

    Args:
        dim: channels.
        depth: blocks.
        kernel_size: of the depthwise convolution, padded to keep the size.
        patch_size: side and stride of the patch embedding.
        num_classes, in_channels: of the task.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        depth: int = 8,
        kernel_size: int = 5,
        patch_size: int = 2,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = _conv_gelu_norm(in_channels, dim, patch_size, stride=patch_size)
        self.blocks = nn.Sequential(*(ConvMixerBlock(dim, kernel_size) for _ in range(depth)))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(dim, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` to logits ``[B, num_classes]``."""
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))))
        return logits


class ConvMixerBlock(nn.Sequential):
    """``[B, dim, H, W]`` to the same: a residual depthwise and a pointwise convolution."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = Residual(
            *_conv_gelu_norm(dim, dim, kernel_size, padding="same", groups=dim)
        )
        self.pointwise = _conv_gelu_norm(dim, dim, 1)


def _conv_gelu_norm(
    in_channels: int, out_channels: int, kernel_size: int, **conv: Any
) -> FusedSequential:
    return FusedSequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **conv),
        nn.GELU(),
        nn.BatchNorm2d(out_channels),
    )


register_model(ConvMixer, "convmixer")
for dim in (256, 512):
    for depth in (6, 8):
        register_model(ConvMixer, f"convmixer_{dim}_{depth}", dim=dim, depth=depth)
