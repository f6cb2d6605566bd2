"""What becomes of the sums of a product before they are stored: scale and bias, or what a fused
convolution does to them, ``affine[2] * activation(affine[0] * sum + affine[1]) + affine[3] +
residual``.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import gelu

_TOKENS, _ROWS = 16, 64  # per program of the pass over finished sums


@dataclass(frozen=True)
class Output:
    """Either bias ``[rows]`` and a 0-d scale, or affine ``[4, rows]``, the name of an activation
    and a residual in the shape of the result.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    affine: Tensor | None = None
    activation: str = "identity"
    residual: Tensor | None = None

    def arguments(self) -> tuple[object, ...]:
        """The argument of ``finished`` and of ``add_residual``.

        Strides stand beside the rest: Triton 3.6 forgets a 1 in a tuple of a tuple in a loop.
        """
        affine = None if self.affine is None else self.affine.contiguous()
        strides = () if self.residual is None else self.residual.stride()
        return self.bias, self.scale, affine, self.residual, *strides

    def finish(self, y: Tensor, sums: Tensor) -> None:
        """Fill ``y`` ``[tokens, rows]`` from ``sums`` ``[parts, tokens, rows]``, which are added in
        order. The two may share memory.
        """
        tokens, rows = y.shape
        grid = (config.cdiv(tokens, _TOKENS) * config.cdiv(rows, _ROWS),)
        _finish_kernel[grid](
            *(sums, y, self.arguments(), len(sums), tokens, rows),
            *(sums.stride(), y.stride(), self.activation, _TOKENS, _ROWS),
        )


@triton.jit
def _of_rows(vector, row, row_ok, AXIS: tl.constexpr):
    values = tl.load(vector + row, mask=row_ok, other=0.0).to(tl.float32)
    return tl.expand_dims(values, 1 - AXIS)


@triton.jit
def finished(sums, output, row, row_ok, rows, ACTIVATION: tl.constexpr, AXIS: tl.constexpr):
    """Sums of two dimensions, all but the residual done; the rows run along AXIS."""
    bias, scale, affine = output[0], output[1], output[2]
    if scale is not None:
        sums *= tl.load(scale).to(tl.float32)
    if bias is not None:
        sums += _of_rows(bias, row, row_ok, AXIS)
    if affine is not None:
        sums *= _of_rows(affine, row, row_ok, AXIS)
        sums += _of_rows(affine + rows, row, row_ok, AXIS)
        if ACTIVATION == "gelu":
            sums = gelu(sums)
        elif ACTIVATION == "relu":
            sums = tl.where(sums < 0, 0.0, sums)  # a NaN stays
        sums *= _of_rows(affine + 2 * rows, row, row_ok, AXIS)
        sums += _of_rows(affine + 3 * rows, row, row_ok, AXIS)
    return sums


@triton.jit
def _finish_kernel(
    sums,
    y,
    output,
    parts,
    tokens,
    rows,
    stride_sums,
    stride_y,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    across = tl.cdiv(rows, ROWS)
    token = (tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    ok = (token < tokens)[:, None] & row_ok[None, :]
    at = sums + token[:, None] * stride_sums[1] + row.to(tl.int64)[None, :] * stride_sums[2]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for _part in range(parts):
        total += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        at += tl.cast(stride_sums[0], tl.int64)
    total = finished(total, output, row, row_ok, rows, ACTIVATION, 1)
    total = add_residual_of_tokens(total, output, token, row, ok)
    at = y + token[:, None] * stride_y[0] + row.to(tl.int64)[None, :] * stride_y[1]
    tl.store(at, total.to(y.dtype.element_ty), mask=ok)


@triton.jit
def add_residual_of_tokens(sums, output, token, row, ok):
    """Sums [tokens, rows] with a residual ``[tokens, rows]``."""
    residual, strides = output[3], output[4:]
    if residual is not None:
        at = token.to(tl.int64)[:, None] * strides[0] + row.to(tl.int64)[None, :] * strides[1]
        sums += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    return sums
