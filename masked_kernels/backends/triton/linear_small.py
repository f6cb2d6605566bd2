"""masked_linear for few tokens where all rows of the weight read the same values: x is multiplied
with these once, and what is left is a product with bits alone.

A bit is taken out of 16 at a time, the halves of the words, by one AND: what remains is a finished
floating-point number. Bit 14 alone is 2.0, in bfloat16 and in float16. In bfloat16 bits 13, 12 and
11 alone are 2^-63, 2^-95 and 2^-111, so that one shift serves four bits, and x makes up for the
difference beforehand: multiplying by a power of two is exact. So that nothing overflows, each token
is first brought to a largest magnitude between 1 and 2. *Plane* b of x holds the columns
``16 * h + b`` in the order of the halves h; the sum over the planes is the product.

In float32 a token takes three slots: bfloat16 parts whose sum it is. Multiplied by 0 or 2^n they
lose nothing, so the result is as exact as a float32 product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, interpreted
from ._helpers import dot_dtype, on_device, split
from .output import Output, add_residual_of_tokens, finished
from .settings import architecture

_ROWS, _COLS = 64, 1024  # per program of the first and the last pass
_SCAN = tl.constexpr(16384)  # columns that the first pass looks at at a time


def aligned_linear(y: Tensor, x: Tensor, values: Tensor, words: Tensor, output: Output) -> None:
    """Fill ``y`` where the period divides the columns."""
    tokens, cols = x.shape
    rows, halves = words.shape[0], 2 * words.shape[1]
    slices = config.slices(x.dtype)
    tile = config.planes_tile(tokens * slices, _takes_weights_from_registers(x))
    blocks = config.cdiv(rows, tile.rows)
    parts, length = split(x, blocks, halves, tile.depth, least=1)
    whole = config.cdiv(halves, tile.depth) * tile.depth
    dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    planes = x.new_empty((16, whole, tile.slots), dtype=dtype)
    magnitude = x.new_empty(tile.slots, dtype=torch.float32)
    partial = x.new_empty((parts, tile.slots, rows), dtype=torch.float32)
    alias = dtype == torch.bfloat16
    with on_device(x):
        _planes_kernel[(config.cdiv(16 * planes.shape[1], _COLS), tile.slots)](
            x,
            values.reshape(-1),
            planes,
            magnitude,
            tokens,
            cols,
            values.numel(),
            planes.shape[1],
            x.stride(),
            values.numel() != cols,
            slices,
            tile.slots,
            alias,
            _COLS,
            num_warps=16,
        )
        _aligned_linear_kernel[(blocks, parts)](
            planes,
            words.contiguous().view(torch.int16),
            partial,
            rows,
            halves,
            length,
            planes.shape[1],
            dot_dtype(dtype),
            alias,
            not interpreted() and torch.version.hip is None,
            tile.rows,
            tile.slots,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _finish_kernel[(config.cdiv(rows, _ROWS), tokens)](
            *(partial, magnitude, output.arguments(), y, rows, parts, y.stride()),
            *(output.activation, slices, tile.slots, _ROWS),
        )


def _takes_weights_from_registers(x: Tensor) -> bool:
    """Whether large products of the device read their left operand from registers: all before
    Blackwell, whose own instruction wants memory, while its older one does not.
    """
    if interpreted():
        return True
    name = architecture(x)
    return not name.startswith("sm_") or int(name.removeprefix("sm_")) < 100


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _planes_kernel(
    x,
    values,
    planes,
    magnitude,
    tokens,
    cols,
    period,
    halves,
    stride,
    WRAPS: tl.constexpr,
    SLICES: tl.constexpr,
    SLOTS: tl.constexpr,
    ALIAS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One slot of some halves of all planes. Every program looks for the largest magnitude of its
    token anew, which takes less time than one more launch.
    """
    slot = tl.program_id(1)
    cols = tl.where(slot < tokens * SLICES, cols, 0)  # other slots are zero
    at = x + (slot // SLICES).to(tl.int64) * stride[0]
    largest = tl.zeros((_SCAN,), tl.float32)
    for start in range(0, cols, _SCAN):
        col = start + tl.arange(0, _SCAN)
        product = _scaled_x(at, values, col, col < cols, period, stride, WRAPS)
        largest = tl.maximum(largest, tl.abs(product))
    # Exponents at the ends are left alone: those of zero, infinity and numbers next to them.
    exponent = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.where((exponent < -126) | (exponent > 126), 0, exponent)
    if tl.program_id(0) == 0:
        tl.store(magnitude + slot, _power_of_two(exponent))

    half = tl.program_id(0) * (COLS // 16) + tl.arange(0, COLS // 16)
    bit = tl.arange(0, 16)
    col = half[:, None] * 16 + bit[None, :]
    part = _scaled_x(at, values, col, col < cols, period, stride, WRAPS)
    part *= _power_of_two(-exponent)
    for _ in range(slot % SLICES):
        part -= part.to(planes.dtype.element_ty).to(tl.float32)
    if ALIAS:
        place = (bit + 1) % 4  # the bit ends up at 11 + place
        step = tl.where(place == 3, -1, tl.where(place == 2, 63, tl.where(place == 1, 95, 111)))
        step = tl.where(bit == 15, -1, step)
        part = part.to(planes.dtype.element_ty).to(tl.float32) * _power_of_two(step)[None, :]
    else:
        part *= 0.5
    out = planes + (bit[None, :] * halves + half[:, None]).to(tl.int64) * SLOTS + slot
    tl.store(out, part.to(planes.dtype.element_ty), mask=(half < halves)[:, None])


@triton.jit
def _scaled_x(at, values, col, ok, period, stride, WRAPS: tl.constexpr):
    x = tl.load(at + col.to(tl.int64) * stride[1], mask=ok, other=0.0).to(tl.float32)
    index = col % period if WRAPS else col
    return x * tl.load(values + index, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _plane(half, BIT: tl.constexpr, ALIAS: tl.constexpr, ASM: tl.constexpr):
    """Numbers that are not zero where the bit of the halves is set: bfloat16 with ALIAS, else
    float16. In assembly, two halves at a time: the compiler would take them apart.
    """
    PLACE: tl.constexpr = (11 + (BIT + 1) % 4) if ALIAS and BIT < 15 else 14
    SHIFT: tl.constexpr = PLACE - BIT
    if ASM:
        MASK: tl.constexpr = (1 << PLACE) * 0x10001
        if SHIFT > 0:
            half = tl.inline_asm_elementwise(
                f"shl.b32 $0, $1, {SHIFT};", "=r,r", [half], tl.int16, True, 2
            )
        elif SHIFT < 0:
            half = tl.inline_asm_elementwise(
                "shr.u32 $0, $1, 1;", "=r,r", [half], tl.int16, True, 2
            )
        if ALIAS:
            plane = tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {MASK};", "=r,r", [half], tl.bfloat16, True, 2
            )
        else:
            plane = tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {MASK};", "=r,r", [half], tl.float16, True, 2
            )
    else:
        if SHIFT > 0:
            half = half << SHIFT
        elif SHIFT < 0:
            half = half >> 1
        half &= 1 << PLACE
        plane = half.to(tl.bfloat16 if ALIAS else tl.float16, bitcast=True)
    return plane


@triton.jit
def _aligned_linear_kernel(
    planes,
    words,
    partial,
    rows,
    halves,
    halves_per_part,
    plane_halves,
    DOT: tl.constexpr,
    ALIAS: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows of one part of the columns, for all slots."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    begin = tl.program_id(1) * halves_per_part
    end = tl.minimum(begin + halves_per_part, halves)
    lane = tl.arange(0, DEPTH)
    at_words = words + row.to(tl.int64)[:, None] * halves + lane[None, :]
    at_planes = planes + lane[:, None] * SLOTS + slot[None, :]
    plane_size = tl.cast(plane_halves, tl.int64) * SLOTS
    acc = tl.zeros((ROWS, SLOTS), tl.float32)
    for start in range(begin, end, DEPTH):
        ok = (row < rows)[:, None] & (start + lane < halves)[None, :]
        half = tl.load(at_words + start, mask=ok, other=0)  # [ROWS, DEPTH]
        for bit in tl.static_range(16):
            x = tl.load(at_planes + bit * plane_size + start * SLOTS)  # [DEPTH, SLOTS]
            w = _plane(half, bit, ALIAS, ASM)
            acc = tl.dot(w.to(DOT), x.to(DOT), acc)
    out = (tl.program_id(1) * SLOTS + slot).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(partial + out, acc, mask=(row < rows)[:, None])


@triton.jit
def _finish_kernel(
    partial,
    magnitude,
    output,
    y,
    rows,
    parts,
    stride,
    ACTIVATION: tl.constexpr,
    SLICES: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add parts and slices of one token, small slices first, and undo its change of magnitude."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    token = tl.program_id(1)
    total = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(SLICES):
        slot = token * SLICES + (SLICES - 1 - i)
        for part in range(parts):
            at = partial + (part * SLOTS + slot).to(tl.int64) * rows + row
            total += tl.load(at, mask=row_ok, other=0.0)
    total *= tl.load(magnitude + token * SLICES)
    total = finished(total[None, :], output, row, row_ok, rows, ACTIVATION, 1)
    token += tl.arange(0, 1)
    total = add_residual_of_tokens(total, output, token, row, row_ok[None, :])
    out = y + token.to(tl.int64)[:, None] * stride[0] + row[None, :] * stride[1]
    tl.store(out, total.to(y.dtype.element_ty), mask=row_ok[None, :])
