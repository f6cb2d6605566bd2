"""Which kernel and which tile serve a problem: pure functions of sizes, dtype and the settings of a
device, no tuning.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

GRAD_COLS = 64
"""Columns of the tiles of every weight-shaped gradient."""


def cdiv(count: int, size: int) -> int:
    """How many blocks of a size cover ``count``. Triton's own takes a microsecond on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


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
        fewest, few, some, many, many_float32: tiles for up to 8 tokens, up to 16, up to 64 tokens
            or rows, and for more. float32 takes twice the space.
    """

    planes_slots: int = 64
    many_tokens: tuple[int, int] = (64, 256)
    fused_cols: int = 512
    fewest: Tile = Tile(rows=32, tokens=8, depth=128)
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
        return settings.fewest if tokens <= 8 else settings.few
    if tokens <= 64 or rows <= 64:
        return settings.some
    return settings.many_float32 if dtype == torch.float32 else settings.many


def parts(tiles: int, steps: int, programs: int, least: int = 4) -> int:
    """Into how many parts a sum of ``steps`` steps is cut so that about ``programs`` run at once.

    Every part has at least ``least`` steps, so that the loop outweighs the adding of the parts.
    """
    return max(1, min(programs // max(tiles, 1), steps // least))


class PartsTile(NamedTuple):
    """Parts that a program adds at a time, and rows and columns of its tile."""

    parts: int
    rows: int
    cols: int


def parts_tile(parts: int) -> PartsTile:
    """One part is a pass over the gradient; several are loaded together, as many as 16 rows of one.

    On an H200 a single part loaded as one of eight takes six times as long.
    """
    return PartsTile(1, 16, GRAD_COLS) if parts == 1 else PartsTile(8, 4, GRAD_COLS)


def channels_last_parts_tile(period: int | None) -> PartsTile:
    """For one part whose columns lie position by position: as wide as values that repeat allow, so
    that it has all positions of many channels.
    """
    cols = 1024 if period is None else min(1024, next_power_of_2(period + 1) // 2)
    return PartsTile(1, 2048 // max(cols, GRAD_COLS), max(cols, GRAD_COLS))


def parts_of_layer(numel: int, total: int, chunk: int, programs: int) -> int:
    """How many programs count the scores of one layer of a model that has ``total`` of them: its
    share, one at least, and not more than it has chunks.
    """
    return max(1, min(cdiv(numel, chunk), programs * numel // total))


@dataclass(frozen=True)
class SmallTopkTile:
    """Scores whose keys one program has in registers, and its warps."""

    scores: int
    warps: int


def small_topk_tile(numel: int) -> SmallTopkTile:
    """For layers of up to ``numel`` scores each."""
    scores = min(max(next_power_of_2(numel), 1024), 8192)
    return SmallTopkTile(scores=scores, warps=scores // 512)


def is_small(numel: int, largest: int) -> bool:
    """Whether one program selects from a layer faster than the launches for all of the device,
    which are made anyway if the largest layer of a model needs them.
    """
    return numel <= 1 << (17 if largest <= 1 << 17 else 13)


def warm_start_pays(total: int) -> bool:
    """Whether a top-k of so many scores is split around the last threshold first: four launches
    more, and one pass over the scores in place of several.
    """
    return total >= 1 << 20


class BandTile(NamedTuple):
    """Words whose scores a program of the warm start looks at at a time, its warps, how many
    programs there are for each that occupies a device, and the fewest scores of one.
    """

    words: int
    warps: int
    programs: int
    least: int


def band_tile() -> BandTile:
    """One warp, which finds places for scores without waiting for others. Enough scores that their
    number inside the band is near what is expected.
    """
    return BandTile(words=8, warps=1, programs=10, least=4096)


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


def grad_plan(
    tokens: int, dtype: torch.dtype, precision: str, settings: Settings = _DEFAULT
) -> Literal["tiles", "library"]:
    """How to multiply for a weight-shaped gradient. A library's product takes one more pass, which
    many tokens outweigh, and float32 without tensor cores from the first.
    """
    if dtype == torch.float32 and precision == "ieee":
        return "library"
    return "library" if tokens >= many_tokens(dtype, settings) else "tiles"


class DecodeTile(NamedTuple):
    """Rows and columns of a weight that one program writes out."""

    rows: int
    cols: int


def decode_tile(cols: int) -> DecodeTile:
    """Of about 4096 weights in few rows, as where a row starts in a prototype takes a division."""
    width = min(max(next_power_of_2(cols), 128), 2048)
    return DecodeTile(4096 // width, width)


def decode_channels_last_tile(cols: int) -> DecodeTile:
    """Of about 1024 weights, as each takes a division and a filter is small."""
    width = min(max(next_power_of_2(cols), 128), 1024)
    return DecodeTile(1024 // width, width)


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
    slots = next(n for n in (8, 16, 32, 64) if slots <= n)
    depth = 64 if slots <= 16 else 32  # what fits into registers and shared memory
    if not from_registers:
        return PlanesTile(rows=64, slots=slots, depth=depth, warps=2, stages=2)
    if slots == 8:
        return PlanesTile(rows=128, slots=slots, depth=depth, warps=4, stages=3)
    if slots == 16:
        return PlanesTile(rows=64, slots=slots, depth=depth, warps=4, stages=3)
    return PlanesTile(rows=128, slots=slots, depth=depth, warps=8 if slots == 64 else 4, stages=2)


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
    """Rows of the weight, strips, and output pixels of a strip of one program: ``strip`` side by
    side in each of ``down`` rows, at most one more than the kernel has.
    """

    rows: int
    strips: int
    strip: int
    down: int = 1
    warps: int = 4


def strips_tile(
    rows: int, size: tuple[int, int], kernel: tuple[int, int], channels_last: bool, adjacent: bool
) -> StripsTile:
    """For images of some height and width. Side by side lie channels or pixels; the strips of a
    program are loaded at once, the pixels of a strip one after the other. Two rows of output share
    the input that they read if the rows of a window and the windows themselves are *adjacent*.
    """
    if not channels_last:
        return StripsTile(rows=16, strips=128, strip=1)
    lanes = 64 if rows >= 64 else 16
    down = 2 if adjacent and min(size[0], kernel[0]) > 1 else 1
    return StripsTile(lanes, 512 // lanes, _strip(size[1]), down)


def _strip(width: int) -> int:
    """Pixels of a strip: 8, or 4 where half of the last 8 would lie past the end of a row."""
    if width < 3:
        return 1
    return 4 if 1 <= width % 8 <= 4 else 8


@dataclass(frozen=True)
class StripsGradTile:
    """As ``StripsTile``, all products of a strip unrolled. A program sums the gradient of
    ``kernel_rows`` rows of the kernel, each position in registers of its own; a multiprocessor has
    registers for so many programs.
    """

    rows: int
    strips: int
    strip: int
    down: int
    kernel_rows: int
    warps: int = 4
    programs: int = 3


def depthwise_grad_tile(
    rows: int, size: tuple[int, int], kernel: tuple[int, int], channels_last: bool
) -> StripsGradTile:
    """For gradients of some height and width. A thread holds two values of each tile, so that up to
    36 positions leave room for the pixels.
    """
    blocks = cdiv(kernel[0], max(1, 36 // kernel[1]))
    kernel_rows = cdiv(kernel[0], blocks)
    if not channels_last:
        return StripsGradTile(rows=2, strips=128, strip=1, down=1, kernel_rows=kernel_rows)
    lanes = 64 if rows >= 64 else 16
    down = 2 if size[0] > 1 and kernel[1] <= 9 else 1
    return StripsGradTile(lanes, 256 // lanes, _strip(size[1]), down, kernel_rows)


@dataclass(frozen=True)
class DepthwiseTile:
    """Pixels and rows of the weight (channels, for the gradient by x) of one program."""

    pixels: int
    rows: int


def depthwise_tile(pixels: int, rows: int) -> DepthwiseTile:
    return DepthwiseTile(pixels=64, rows=64) if rows >= 64 else DepthwiseTile(pixels=128, rows=16)


@dataclass(frozen=True)
class ImageTile:
    """Pixels and channels of one step of a program's loop, and launch options."""

    pixels: int
    channels: int
    warps: int
    stages: int


def image_tile(channels_last: bool) -> ImageTile:
    """For passes over an image without a weight: 16 values a lane, 128 bytes of 16-bit channels."""
    if channels_last:
        return ImageTile(pixels=64, channels=64, warps=8, stages=3)
    return ImageTile(pixels=4096, channels=1, warps=8, stages=3)
