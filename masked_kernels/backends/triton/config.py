"""Which kernel and which tile serve a problem: pure functions of sizes and dtype, no tuning."""

from dataclasses import dataclass
from typing import Literal

import torch

GRAD_COLS = 64
"""Columns of the tiles of every weight-shaped gradient."""

PARTS_ROWS = 16
"""Rows of the tiles in which parts are added."""


@dataclass(frozen=True)
class Tile:
    """Sizes of the block that one program computes, the step of its loop, and launch options."""

    rows: int  # of the weight
    tokens: int
    depth: int  # columns of the weight that one step of the loop multiplies, a multiple of 32
    warps: int = 4
    stages: int = 3


def linear_tile(tokens: int, rows: int, dtype: torch.dtype) -> Tile:
    """For ``[tokens, cols] x [rows, cols]``, fp32 at half the size as it takes twice the space."""
    if tokens <= 16:
        return Tile(rows=32, tokens=16, depth=128)
    if tokens <= 64 or rows <= 64:
        return Tile(rows=64, tokens=64, depth=64)
    if dtype == torch.float32:
        return Tile(rows=64, tokens=128, depth=32)
    return Tile(rows=128, tokens=128, depth=64, warps=8)


def parts(tiles: int, steps: int, programs: int, least: int = 4) -> int:
    """Into how many parts a sum of ``steps`` steps is cut so that about ``programs`` run at once.

    Every part has at least ``least`` steps, so that the loop outweighs the adding of the parts.
    """
    return max(1, min(programs // max(tiles, 1), steps // least))


def parts_of_layer(numel: int, total: int, chunk: int, programs: int) -> int:
    """How many programs count the scores of one layer of a model that has ``total`` of them: its
    share, one at least, and not more than it has chunks.
    """
    return max(1, min(-(-numel // chunk), programs * numel // total))


def linear_plan(
    tokens: int, rows: int, cols: int, period: int, dtype: torch.dtype, fused: bool = False
) -> Literal["planes", "tiles", "library"]:
    """How to multiply ``tokens`` inputs with a weight ``[rows, cols]``.

    *Planes* (``linear_small.py``) takes three launches where *tiles* takes one, so the weight must
    be large enough that instructions count. *Library* writes the decoded weight once and hands it
    to torch: with many tokens the decoding is lost in the product. What is *fused* to the product
    then takes one more pass over the result. The bounds are estimates from bytes and instructions,
    not measurements.
    """
    aligned = period > 0 and cols % period == 0
    if aligned and tokens * slices(dtype) <= 64 and cols >= 1024 and rows * cols >= 1 << 20:
        return "planes"
    return (
        "library"
        if tokens >= many_tokens(dtype) and not _fusing_pays(fused, cols, dtype)
        else "tiles"
    )


def _fusing_pays(fused: bool, cols: int, dtype: torch.dtype) -> bool:
    """Whether a pass over the result that is saved outweighs decoding the weight for every tile."""
    return fused and cols <= 512 and dtype != torch.float32


def value_copies(period: int, count: int, cols: int, vector: int) -> int:
    """How many copies of values that repeat, each shifted by one, so that a row can be loaded by as
    many values at a time; as long as the copies are small beside the ``count`` weights.
    """
    return next(n for n in (vector, 2, 1) if n == 1 or 4 * n * (period + cols) <= count)


def many_tokens(dtype: torch.dtype) -> int:
    """From how many tokens on a library's product of the decoded weight is the better one; exact
    float32 does without tensor cores, where Triton is no match.
    """
    return 64 if dtype == torch.float32 else 256


def conv_plan(
    pixels: int, cols: int, dtype: torch.dtype, fused: bool = False
) -> Literal["gather", "library"]:
    """How to convolve into ``pixels`` pixels: gather tiles of the image, or decode and call torch.

    A weight is small beside the images that it is meant for, so that decoding it costs little.
    """
    many = pixels >= 4 * many_tokens(dtype)
    return "library" if many and not _fusing_pays(fused, cols, dtype) else "gather"


def slices(dtype: torch.dtype) -> int:
    """Numbers of 16 bits that one of ``dtype`` is cut into."""
    return 3 if dtype == torch.float32 else 1


@dataclass(frozen=True)
class PlanesTile:
    """Rows of the weight, slots for tokens, and halves of words in one step of the loop."""

    rows: int
    slots: int
    depth: int
    warps: int
    stages: int


def planes_tile(slots: int, from_registers: bool = True) -> PlanesTile:
    """For ``slots`` slots in use. Tall tiles, as each reads all of x anew.

    Two warps are too few for the instruction of Blackwell that takes no registers
    (``from_registers`` is False), so that the compiler falls back on the older one.
    """
    slots = 16 if slots <= 16 else 32 if slots <= 32 else 64
    depth = 64 if slots == 16 else 32  # what fits into registers and shared memory
    if from_registers:
        return PlanesTile(rows=128, slots=slots, depth=depth, warps=4, stages=2)
    return PlanesTile(rows=64, slots=slots, depth=depth, warps=2, stages=2)


@dataclass(frozen=True)
class GradTile:
    """The block of a weight-shaped gradient that one program computes, ``GRAD_COLS`` wide."""

    rows: int
    depth: int  # tokens or pixels of one step
    warps: int = 4
    stages: int = 3


def grad_tile(rows: int, dtype: torch.dtype) -> GradTile:
    """For the gradient ``[rows, cols]``."""
    if dtype == torch.float32 or rows <= 64:
        return GradTile(rows=64, depth=32)
    return GradTile(rows=128, depth=64, warps=8)


@dataclass(frozen=True)
class StripsTile:
    """Rows of the weight, strips, and output pixels of a strip of one program."""

    rows: int
    strips: int
    strip: int


def strips_tile(rows: int, width: int, channels_last: bool) -> StripsTile:
    """For images ``width`` wide. Side by side lie channels or pixels; the strips of a program are
    loaded at once, the pixels of a strip one after the other.
    """
    if not channels_last:
        return StripsTile(rows=16, strips=128, strip=1)
    strip = 4 if width >= 4 else 1
    if rows >= 64:
        return StripsTile(rows=64, strips=16, strip=strip)
    return StripsTile(rows=16, strips=64, strip=strip)


@dataclass(frozen=True)
class DepthwiseTile:
    """Pixels and rows of the weight (channels, for the gradient by x) of one program."""

    pixels: int
    rows: int


def depthwise_tile(pixels: int, rows: int) -> DepthwiseTile:
    return DepthwiseTile(pixels=64, rows=64) if rows >= 64 else DepthwiseTile(pixels=128, rows=16)


def depthwise_grad_tile(rows: int) -> DepthwiseTile:
    return DepthwiseTile(pixels=64, rows=32)


def image_tile(channels_last: bool) -> DepthwiseTile:
    """Pixels and channels of the passes that go over an image without a weight."""
    return (
        DepthwiseTile(pixels=32, rows=64) if channels_last else DepthwiseTile(pixels=1024, rows=1)
    )
