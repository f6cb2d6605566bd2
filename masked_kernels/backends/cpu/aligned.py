"""``aligned_linear``: prototypes whose period fits the rows, multiplied by their bits alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._native import as_float, native, optional_float
from ._relaid import relaid
from .bits import transpose
from .plan import row_patterns


def aligned_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    patterns = row_patterns(x.shape[1], values.numel()) or 1
    y: Tensor = native().aligned_linear(
        as_float(x),
        as_float(values),
        _tiles(words, x.shape[1], patterns),
        words.shape[0],
        optional_float(bias),
        optional_float(scale),
    )
    return y if x.dtype == y.dtype else y.to(x.dtype)


def bind_aligned_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """``aligned_linear`` of tensors like x; all are contiguous and float32."""
    rows, cols = words.shape[0], x.shape[1]
    tiles = _tiles(words, cols, row_patterns(cols, values.numel()) or 1)
    run = native().aligned_linear.default
    return lambda x: run(x, values, tiles, rows, bias, scale)


def aligned_linear_fused_(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,
) -> None:
    """Over the pixels of x ``[B, H, W, C]``, for one row pattern, into y ``[B, H, W, N]``."""
    tiles = _tiles(words, x.shape[3], 1)
    native().aligned_linear_fused_(
        y, x, as_float(values), tiles, words.shape[0], affine, activation, residual
    )


def aligned_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    """For each row pattern: the binary product with its transposed bits, times its values."""
    patterns = row_patterns(cols, values.numel()) or 1
    row_values = as_float(values).repeat(max(cols // values.numel(), 1)).view(patterns, cols)
    affine = row_values.new_zeros(4, cols)
    affine[2] = 1
    one = row_values.new_ones(1)
    grad_x = row_values.new_empty(1, 1, grad_y.shape[0], cols)
    for pattern in range(patterns):
        bits = transpose(words[pattern::patterns], cols)
        tiles = native().aligned_tiles(bits, words[pattern::patterns].shape[0], 1)
        torch.mul(row_values[pattern], 1 if scale is None else scale, out=affine[0])
        grad_tokens = as_float(grad_y[:, pattern::patterns])[None, None]
        others = grad_x if pattern else None
        native().aligned_linear_fused_(
            grad_x, grad_tokens, one, tiles, cols, affine, "identity", others
        )
    return grad_x.view(-1, cols).to(grad_y.dtype)


def _tiles(words: Tensor, cols: int, patterns: int) -> Tensor:
    """The words as ``aligned_linear`` reads them."""
    tiles: Tensor = relaid(
        words,
        ("aligned", cols, patterns),
        lambda: native().aligned_tiles(words.contiguous(), cols, patterns),
    )
    return tiles
