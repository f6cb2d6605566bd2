"""What kernels on strips of output pixels share: where a strip lies and the pixels it reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted
from ._conv import pixel_of


def widens_in_assembly(image: Tensor) -> bool:
    return image.dtype == torch.bfloat16 and not interpreted() and torch.version.hip is None


@triton.jit
def strip_of(index, geometry, DOWN: tl.constexpr, STRIP: tl.constexpr):
    """Image, and row and column of the first output pixel."""
    image, down, right = pixel_of(index, tl.cdiv(geometry[2], DOWN), tl.cdiv(geometry[3], STRIP))
    return image, down * DOWN, right * STRIP


@triton.jit
def below(index, size):
    """Whether 0 <= index < size, in one comparison."""
    return index.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)


@triton.jit
def beside(pixel, strides, DOWN, RIGHT):
    """Pointers to the pixels so many rows and columns further on."""
    return pixel + (tl.cast(strides[2], tl.int64) * DOWN + tl.cast(strides[3], tl.int64) * RIGHT)


@triton.jit
def _widened(tile, ASM: tl.constexpr):
    """float32 of a tile. In assembly, two of bfloat16 at a time: the compiler would unpack both
    before it shifts them.
    """
    if ASM:
        tile = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=&r,=r,r",
            [tile.to(tl.int16, bitcast=True)],
            tl.int32,
            True,
            2,
        ).to(tl.float32, bitcast=True)
    return tile.to(tl.float32)


@triton.jit
def load_pixels(pixel, strides, col, width, ok, DOWN, COUNT: tl.constexpr, ASM: tl.constexpr):
    """float32 tiles of COUNT pixels side by side from column ``col`` of a row on, which lies DOWN
    rows below; zeros outside of the image.
    """
    tiles = ()
    for c in tl.static_range(COUNT):
        inside = ok & below(col + c, width)[:, None]
        tile = tl.load(beside(pixel, strides, DOWN, c), mask=inside, other=0.0)
        tiles += (_widened(tile, ASM),)
    return tiles


@triton.jit
def zeros(COUNT: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tl.zeros((STRIPS, ROWS), tl.float32),)
    return tiles
