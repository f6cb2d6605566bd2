"""select_threshold and select_nm, and what all rules share: sort keys and the check for NaN.

A NaN must raise, but a kernel cannot raise. The kernels leave the lowest flat index of a NaN in a
flag, one a device. The host must not wait for it, or it would launch nothing meanwhile: each call
looks at a copy of the flag that has arrived, if there is one, and sends for the next. So on a GPU
the error comes from a later call, or from ``check_scores``, which waits. While a CUDA graph is
captured nothing may be read: then the flag stays set by a replay, and a call outside of a capture
raises.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import words_per_row
from . import config
from ._helpers import WORDS, on_device, pack_bits, word_elements

_NO_NAN = tl.constexpr(2**63 - 1)
NAN_LAYER = tl.constexpr(2**40)
"""What counts before the index in a tensor, which is smaller: 0 for the scores of an op of one
tensor, i + 1 for ``scores[i]``.
"""


class _Flag:
    """Of one device: where its kernels leave the lowest index of a NaN, and its way to the host."""

    def __init__(self, device: torch.device) -> None:
        self.index = torch.full((), _NO_NAN.value, dtype=torch.int64, device=device)
        if device.type == "cuda":
            self._copy = torch.full((), _NO_NAN.value, dtype=torch.int64, device="cpu").pin_memory()
            self._copied = torch.cuda.Event()
            torch.cuda.synchronize(device)  # other streams use it too; an error in a capture

    def look(self) -> None:
        """Raise for a NaN that is known of, without a wait. The device must be the current one."""
        if not self.index.is_cuda:
            self._raise(int(self.index))
        elif not torch.cuda.is_current_stream_capturing() and self._copied.query():
            self._raise(int(self._copy))
            self._copy.copy_(self.index, non_blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Raise for a NaN in what was launched so far."""
        if self.index.is_cuda:
            torch.cuda.synchronize(self.index.device)
        self._raise(int(self.index))

    def _raise(self, found: int) -> None:
        if found == _NO_NAN.value:
            return
        self.index.fill_(_NO_NAN.value)
        if self.index.is_cuda:
            torch.cuda.synchronize(self.index.device)  # no stream shall copy what is told now
            self._copy.fill_(_NO_NAN.value)
        layer, index = divmod(found, NAN_LAYER.value)
        name = f"scores[{layer - 1}]" if layer else "scores"
        raise ValueError(f"{name}: NaN at flat index {index}; scores must not contain NaN")


_flags: dict[torch.device, _Flag] = {}


def nan_flag(device: torch.device) -> Tensor:
    """Where kernels leave the lowest index of a NaN."""
    if device not in _flags:
        _flags[device] = _Flag(device)
    return _flags[device].index


def raise_if_nan(device: torch.device) -> None:
    """Raise ``ValueError`` for a NaN that a kernel is known to have found. The device must be the
    current one.
    """
    _flags[device].look()


def check_scores() -> None:
    """As ``backends.check_scores`` says."""
    for flag in _flags.values():
        flag.wait()


def select_threshold(scores: Tensor, threshold: float) -> Tensor:
    words = scores.new_empty(_words_shape(scores), dtype=torch.int32)
    if words.numel():
        # torch compares a tensor with a number in the dtype of the tensor.
        rounded = torch.tensor(threshold, dtype=scores.dtype).item()
        with on_device(scores):
            _select_threshold_kernel[(config.cdiv(words.numel(), WORDS),)](
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
            _select_nm_kernel[(config.cdiv(words.numel(), WORDS),)](
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
def flag_nan(flag, index, nan):
    """Lower the flag to the lowest index of a NaN."""
    at = flag + tl.zeros(index.shape, tl.int32)
    tl.atomic_min(at, index.to(tl.int64), mask=nan, sem="relaxed")


@triton.jit
def _load_scores(
    scores, flag, rows, cols, words_per_row, stride_row, stride_col, BLOCK: tl.constexpr
):
    """float32 scores [BLOCK, 32] of this program's words, with their row offsets and columns."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, col, ok = word_elements(first, rows, cols, words_per_row, BLOCK)
    score = tl.load(scores + row[:, None] * stride_row + col * stride_col, mask=ok, other=0.0)
    score = score.to(tl.float32)
    flag_nan(flag, row[:, None] * cols + col, ok & (score != score))
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
