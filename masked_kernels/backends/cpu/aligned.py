"""``aligned_linear``: prototypes whose period fits the rows, multiplied by their bits alone; as a
convolution over the patches of an image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._native import as_float, native, optional_float
from ._relaid import relaid
from .bits import transpose
from .plan import row_patterns

Geometry = Sequence[int]
"""Kernel, stride, padding and dilation of a convolution, height before width; or nothing."""


def aligned_linear(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry = (),
) -> Tensor:
    """For tokens x ``[M, K]``; with a geometry for the patches of images x ``[B, H, W, C]``."""
    cols, taps = _row(x.shape[-1], geometry)
    patterns = row_patterns(cols, values.numel()) or 1
    y: Tensor = native().aligned_linear(
        as_float(x),
        _by_tap(values, cols, taps),
        _tiles(words, cols, patterns, taps),
        words.shape[0],
        optional_float(bias),
        optional_float(scale),
        geometry,
    )
    return y if x.dtype == y.dtype else y.to(x.dtype)


def bind_aligned_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """``aligned_linear`` of tensors like x; all are contiguous and float32."""
    rows, cols = words.shape[0], x.shape[1]
    tiles = _tiles(words, cols, row_patterns(cols, values.numel()) or 1)
    run = native().aligned_linear.default
    return lambda x: run(x, values, tiles, rows, bias, scale, ())


def aligned_linear_fused_(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,
    geometry: Geometry = (),
) -> None:
    """Into y ``[..., N]``, for one row pattern."""
    native().aligned_linear_fused_(
        y,
        x,
        *aligned_operands(x.shape[-1], values, words, geometry),
        words.shape[0],
        affine,
        activation,
        residual,
        geometry,
    )


def aligned_operands(
    channels: int, values: Tensor, words: Tensor, geometry: Geometry = ()
) -> tuple[Tensor, Tensor]:
    """The values and the bits as the kernels read them, for one row pattern."""
    cols, taps = _row(channels, geometry)
    return _by_tap(values, cols, taps), _tiles(words, cols, 1, taps)


def aligned_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    """For each row pattern: the binary product with its transposed bits, times its values."""
    patterns = row_patterns(cols, values.numel()) or 1
    row_values = as_float(values).repeat(max(cols // values.numel(), 1)).view(patterns, cols)
    affine = row_values.new_zeros(4, cols)
    affine[2] = 1
    one = row_values.new_ones(1)
    grad_x = row_values.new_empty(grad_y.shape[0], cols)
    for pattern in range(patterns):
        bits = transpose(words[pattern::patterns], cols)
        tiles = native().aligned_tiles(bits, words[pattern::patterns].shape[0], 1, 1)
        torch.mul(row_values[pattern], 1 if scale is None else scale, out=affine[0])
        grad_tokens = as_float(grad_y[:, pattern::patterns])
        others = grad_x if pattern else None
        native().aligned_linear_fused_(
            grad_x, grad_tokens, one, tiles, cols, affine, "identity", others, ()
        )
    return grad_x.to(grad_y.dtype)


def _row(channels: int, geometry: Geometry) -> tuple[int, int]:
    """The columns of a weight row, and how many of them are taps of one channel."""
    taps = geometry[0] * geometry[1] if geometry else 1
    return channels * taps, taps


def _by_tap(values: Tensor, cols: int, taps: int) -> Tensor:
    """The row patterns ``[C, taps]`` as ``[taps, C]``, the order of a patch; float32."""

    def turned() -> Tensor:
        rows = as_float(values).repeat(max(cols // values.numel(), 1)).view(-1, cols // taps, taps)
        return rows.transpose(1, 2).reshape(-1)

    return as_float(values) if taps == 1 else relaid(values, ("by tap", cols, taps), turned)


def _tiles(words: Tensor, cols: int, patterns: int, taps: int = 1) -> Tensor:
    """The words as ``aligned_linear`` reads them."""
    tiles: Tensor = relaid(
        words,
        ("aligned", cols, patterns, taps),
        lambda: native().aligned_tiles(words.contiguous(), cols, patterns, taps),
    )
    return tiles
