"""Which kernel and which tile serve a problem: pure functions of sizes, dtype and the settings of a
device, no tuning.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True)
class Settings:
    """What differs from device to device. The defaults, and those of ``gpus.json`` but for a GPU
    that was measured, are estimates from bytes, instructions and the size of shared memory.

    Args:
        planes_slots: the most slots (tokens, three a token of float32) for which the bit planes of
            an aligned prototype are the better kernel; 64 at most.
        many_tokens: from how many tokens on a library's product of the decoded weight is the better
            one, in float32, which does without tensor cores where it is exact, and in 16 bits.
        fused_cols: up to how many columns a weight is decoded in each tile all the same, if that
            saves a pass over the result; in 16 bits.
        few, some, many, many_float32: tiles for up to 16 tokens, for up to 64 tokens or rows, and
            for more. float32 takes twice the space.
    """

    planes_slots: int = 64
    many_tokens: tuple[int, int] = (64, 256)
    fused_cols: int = 512
    few: Tile = Tile(rows=32, tokens=16, depth=128)
    some: Tile = Tile(rows=64, tokens=64, depth=64)
    many: Tile = Tile(rows=128, tokens=128, depth=64, warps=8)
    many_float32: Tile = Tile(rows=64, tokens=128, depth=32)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Settings":
        """Fields that are not given keep their defaults; those of other names are notes."""
        known = {field.name for field in dataclasses.fields(Settings)}
        given = {name: value for name, value in fields.items() if name in known}
        for name, value in given.items():
            if isinstance(value, dict):
                given[name] = Tile(**value)
            elif isinstance(value, list):
                given[name] = tuple(value)
        return Settings(**given)


_DEFAULT = Settings()


def linear_tile(tokens: int, rows: int, dtype: torch.dtype, settings: Settings = _DEFAULT) -> Tile:
    """For ``[tokens, cols] x [rows, cols]``."""
    if tokens <= 16:
        return settings.few
    if tokens <= 64 or rows <= 64:
        return settings.some
    return settings.many_float32 if dtype == torch.float32 else settings.many


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


@dataclass(frozen=True)
class SmallTopkTile:
    """Scores whose keys one program has in registers, and its warps."""

    scores: int
    warps: int


def small_topk_tile(numel: int) -> SmallTopkTile:
    """For layers of up to ``numel`` scores each."""
    scores = min(max(1 << (numel - 1).bit_length(), 1024), 8192)
    return SmallTopkTile(scores=scores, warps=scores // 512)


def is_small(numel: int) -> bool:
    """Whether one program selects from a layer faster than the launches for all of the device."""
    return numel <= 1 << 17


def warm_start_pays(total: int) -> bool:
    """Whether a top-k of so many scores is split around the last threshold first: four launches
    more, and one pass over the scores in place of several.
    """
    return total >= 1 << 22


def topk_sample() -> int:
    """How many scores stand for all where there is no last threshold; 0 for no such start."""
    return 8192


def linear_plan(
    tokens: int,
    rows: int,
    cols: int,
    period: int,
    dtype: torch.dtype,
    fused: bool = False,
    settings: Settings = _DEFAULT,
) -> Literal["planes", "tiles", "library"]:
    """How to multiply ``tokens`` inputs with a weight ``[rows, cols]``.

    *Planes* (``linear_small.py``) takes three launches where *tiles* takes one, so the weight must
    be large enough that instructions count. *Library* writes the decoded weight once and hands it
    to torch: with many tokens the decoding is lost in the product. What is *fused* to the product
    then takes one more pass over the result.
    """
    aligned = period > 0 and cols % period == 0
    slots = tokens * slices(dtype)
    if aligned and slots <= settings.planes_slots and cols >= 1024 and rows * cols >= 1 << 20:
        return "planes"
    many = tokens >= many_tokens(dtype, settings)
    return "library" if many and not _fusing_pays(fused, cols, dtype, settings) else "tiles"


def _fusing_pays(fused: bool, cols: int, dtype: torch.dtype, settings: Settings) -> bool:
    """Whether a pass over the result that is saved outweighs decoding the weight for every tile."""
    return fused and cols <= settings.fused_cols and dtype != torch.float32


def many_tokens(dtype: torch.dtype, settings: Settings = _DEFAULT) -> int:
    """From how many tokens on the weight is decoded for a library."""
    return settings.many_tokens[0 if dtype == torch.float32 else 1]


def conv_plan(
    pixels: int,
    cols: int,
    dtype: torch.dtype,
    fused: bool = False,
    settings: Settings = _DEFAULT,
) -> Literal["gather", "library"]:
    """How to convolve into ``pixels`` pixels: gather tiles of the image, or decode and call torch.

    A weight is small beside the images that it is meant for, so that decoding it costs little.
    """
    many = pixels >= 4 * many_tokens(dtype, settings)
    return "library" if many and not _fusing_pays(fused, cols, dtype, settings) else "gather"


def is_wide(count: int) -> bool:
    """Whether an index of that many values may need more than 32 bits; a row is added to it."""
    return count >= 1 << 30


def value_copies(period: int, count: int, cols: int, vector: int) -> int:
    """How many copies of values that repeat, each shifted by one, so that a row can be loaded by as
    many values at a time; as long as the copies are small beside the ``count`` weights.
    """
    return next(n for n in (vector, 2, 1) if n == 1 or 4 * n * (period + cols) <= count)


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
