"""What the convolution files share: geometry on the host and in kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import conv_memory_format, conv_size


@dataclass(frozen=True)
class Geometry:
    """A convolution of an image ``[batch, channels, height, width]``."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    def of(
        x_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> "Geometry":
        batch, channels, *size = x_size
        pairs = (tuple(pair) for pair in (size, kernel_size, stride, padding, dilation))
        return Geometry(batch, channels, *pairs, groups)

    @property
    def out_size(self) -> tuple[int, int]:
        spans = (self.size, self.kernel, self.stride, self.padding, self.dilation)
        height, width = map(conv_size, *spans)
        return height, width

    @property
    def out_pixels(self) -> int:
        height, width = self.out_size
        return self.batch * height * width

    @property
    def in_pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def cols(self) -> int:
        return self.group_channels * self.positions

    @property
    def positions(self) -> int:
        """Of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer over the pixels."""
        return self.groups == 1 and self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    def arguments(self) -> tuple[int, ...]:
        """What ``window`` and ``window_back`` take: pairs of size, out_size, stride, padding,
        dilation.
        """
        return (*self.size, *self.out_size, *self.stride, *self.padding, *self.dilation)


def is_channels_last(image: Tensor) -> bool:
    return conv_memory_format(image) == torch.channels_last


def new_image(
    like: Tensor, size: Sequence[int], memory_format: torch.memory_format | None = None
) -> Tensor:
    """An empty image, in the memory format of ``like`` unless one is given."""
    memory_format = memory_format or conv_memory_format(like)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def as_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` channels_last as ``[B * H * W, C]``."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """``[B * H * W, C]`` as channels_last with the pixels of ``like``."""
    batch, _, height, width = like.shape
    image = tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=torch.channels_last)


def convolution_grads(
    grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> list[Tensor]:
    """torch's gradients by x and by the weight, None where not wanted."""
    g = geometry
    pairs = (g.stride, g.padding, g.dilation)
    grads: list[Tensor] = torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, *pairs, False, (0, 0), g.groups, (*wanted, False)
    )
    return grads


@triton.jit
def pixel_of(index, height, width):
    """Image (64 bits, to be multiplied by its stride), row and column of pixels of a batch."""
    image = index // (height * width)
    return image.to(tl.int64), index // width % height, index % width


@triton.jit
def window(geometry, out_row, out_col):
    """Row and column of the first input pixel that the windows at output pixels read."""
    row = out_row * geometry[4] - geometry[6]
    col = out_col * geometry[5] - geometry[7]
    return row, col


@triton.jit
def window_back(geometry, row, col, r, s):
    """The output pixels whose window reads the given input pixels at kernel position (r, s): row,
    column, and whether there is one.
    """
    down = row + geometry[6] - r * geometry[8]
    right = col + geometry[7] - s * geometry[9]
    out_row, out_col = down // geometry[4], right // geometry[5]
    ok = (down >= 0) & (right >= 0) & (out_row < geometry[2]) & (out_col < geometry[3])
    ok &= (out_row * geometry[4] == down) & (out_col * geometry[5] == right)
    return out_row, out_col, ok


@triton.jit
def in_bounds(row, col, height, width):
    return (row >= 0) & (row < height) & (col >= 0) & (col < width)


@triton.jit
def image_at(strides, image, row, col, channel):
    """Offsets [pixel, channel]; ``image`` has 64 bits."""
    at = image * strides[0] + row.to(tl.int64) * strides[2] + col.to(tl.int64) * strides[3]
    return at[:, None] + channel.to(tl.int64)[None, :] * strides[1]


@triton.jit
def add_residual_of_image(sums, output, image, row, col, channel, ok):
    """Sums [pixel, channel] with a residual ``[B, C, H, W]``."""
    residual, strides = output[3], output[4:]
    if residual is not None:
        at = image_at(strides, image, row, col, channel)
        sums += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    return sums
