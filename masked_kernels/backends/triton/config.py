"""Which kernel and which tile serve a problem: pure functions of sizes and dtype, no tuning."""

from dataclasses import dataclass

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


def parts(tiles: int, steps: int, programs: int) -> int:
    """Into how many parts a sum of ``steps`` steps is cut so that about ``programs`` run at once.

    Every part has at least four steps, so that the loop outweighs the pass that adds the parts.
    """
    return max(1, min(programs // max(tiles, 1), steps // 4))


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
class DepthwiseTile:
    """Pixels and rows of the weight (channels, for the gradient by x) of one program."""

    pixels: int
    rows: int


def depthwise_tile(pixels: int, rows: int) -> DepthwiseTile:
    return DepthwiseTile(pixels=64, rows=64) if rows >= 64 else DepthwiseTile(pixels=128, rows=16)


def depthwise_grad_tile(rows: int) -> DepthwiseTile:
    return DepthwiseTile(pixels=64, rows=32)
