"""select_threshold and select_nm, and what all rules share: sort keys and the check for NaN.

A NaN must raise, but a kernel cannot raise. The kernels leave the lowest flat index of a NaN in a
flag, one a device, and ``raise_if_nan`` reads it after the launch. The index of the layer among
those of one call counts before the one in the tensor. While a CUDA graph is captured nothing may be
read: then the flag stays set by a replay, and the next call outside of a capture raises.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import words_per_row
from ._helpers import WORDS, on_device, pack_bits, word_elements

_NO_NAN = tl.constexpr(2**63 - 1)
NAN_LAYER = tl.constexpr(2**40)
"""What a layer's index is multiplied by: more than the scores of any tensor."""

_flags: dict[torch.device, Tensor] = {}


def nan_flag(device: torch.device) -> Tensor:
    """Where kernels leave the lowest index of a NaN."""
    if device not in _flags:
        _flags[device] = torch.full((), _NO_NAN.value, dtype=torch.int64, device=device)
        if device.type == "cuda":  # other streams use it too; an error if a graph is captured
            torch.cuda.synchronize(device)
    return _flags[device]


def raise_if_nan(device: torch.device, many: bool = False) -> None:
    """Raise ``ValueError`` for a NaN that a kernel found since the last call, in one or in one of
    many scores.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    flag = int(_flags[device])
    if flag != _NO_NAN.value:
        _flags[device].fill_(_NO_NAN.value)
        layer, index = divmod(flag, NAN_LAYER.value)
        name = f"scores[{layer}]" if many or layer else "scores"
        raise ValueError(f"{name}: NaN at flat index {index}; scores must not contain NaN")


def select_threshold(scores: Tensor, threshold: float) -> Tensor:
    words = scores.new_empty(_words_shape(scores), dtype=torch.int32)
    if words.numel():
        # torch compares a tensor with a number in the dtype of the tensor.
        rounded = torch.tensor(threshold, dtype=scores.dtype).item()
        with on_device(scores):
            _select_threshold_kernel[(triton.cdiv(words.numel(), WORDS),)](
                scores,
                words,
                nan_flag(scores.device),
                rounded,
                *scores.shape,
                words.shape[1],
                *scores.stride(),
                WORDS,
            )
        raise_if_nan(scores.device)
    return words


def select_nm(scores: Tensor, n: int, m: int, absolute: bool) -> Tensor:
    words = scores.new_empty(_words_shape(scores), dtype=torch.int32)
    if words.numel():
        with on_device(scores):
            _select_nm_kernel[(triton.cdiv(words.numel(), WORDS),)](
                scores,
                words,
                nan_flag(scores.device),
                n,
                m,
                *scores.shape,
                words.shape[1],
                *scores.stride(),
                absolute,
                WORDS,
            )
        raise_if_nan(scores.device)
    return words


def _words_shape(scores: Tensor) -> tuple[int, int]:
    return scores.shape[0], words_per_row(scores.shape[1])


@triton.jit
def sort_keys(score, ABSOLUTE: tl.constexpr):
    """uint32 that order as the scores do, both zeros alike."""
    bits = score.to(tl.float32).to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if ABSOLUTE:
        return magnitude
    return tl.where(bits > 0x80000000, bits ^ 0xFFFFFFFF, magnitude | 0x80000000)


@triton.jit
def flag_nan(flag, score, index, ok):
    """Lower the flag to the lowest index of a NaN."""
    nan = ok & (score != score)
    if tl.max(nan.to(tl.int32).reshape(nan.numel), axis=0) > 0:
        index = tl.where(nan, index.to(tl.int64), _NO_NAN)
        tl.atomic_min(flag, tl.min(index.reshape(index.numel), axis=0))


@triton.jit
def _load_scores(
    scores, flag, rows, cols, words_per_row, stride_row, stride_col, BLOCK: tl.constexpr
):
    """float32 scores [BLOCK, 32] of this program's words, with their row offsets and columns."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, col, ok = word_elements(first, rows, cols, words_per_row, BLOCK)
    score = tl.load(scores + row[:, None] * stride_row + col * stride_col, mask=ok, other=0.0)
    score = score.to(tl.float32)
    flag_nan(flag, score, row[:, None] * cols + col, ok)
    return score, row, col, ok


@triton.jit
def store_words(words, block, bits, count, BLOCK: tl.constexpr):
    """Bits [BLOCK, 32] as a block of words."""
    word = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + word, pack_bits(bits), mask=word < count)


@triton.jit
def _select_threshold_kernel(
    scores,
    words,
    flag,
    threshold,
    rows,
    cols,
    words_per_row,
    stride_row,
    stride_col,
    BLOCK: tl.constexpr,
):
    score, _row, _col, ok = _load_scores(
        scores, flag, rows, cols, words_per_row, stride_row, stride_col, BLOCK
    )
    store_words(words, tl.program_id(0), ok & (score > threshold), rows * words_per_row, BLOCK)


@triton.jit
def _select_nm_kernel(
    scores,
    words,
    flag,
    n,
    m,
    rows,
    cols,
    words_per_row,
    stride_row,
    stride_col,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An element is kept if fewer than n of its group come before it: larger ones, and equal ones
    of a higher index.
    """
    score, row, col, ok = _load_scores(
        scores, flag, rows, cols, words_per_row, stride_row, stride_col, BLOCK
    )
    key = sort_keys(score, ABSOLUTE)
    ahead = tl.zeros((BLOCK, 32), tl.int32)
    for j in range(m):
        other_col = col - col % m + j
        there = ok & (other_col < cols)
        at = scores + row[:, None] * stride_row + other_col * stride_col
        other = sort_keys(tl.load(at, mask=there, other=0.0).to(tl.float32), ABSOLUTE)
        before = (other > key) | ((other == key) & (other_col > col))
        ahead += (there & before).to(tl.int32)
    store_words(words, tl.program_id(0), ok & (ahead < n), rows * words_per_row, BLOCK)
