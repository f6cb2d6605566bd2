"""select_topk: a radix search for the key of the first score that is kept, then a pass that packs.

Four passes over the scores count one byte of the keys each, most significant first, among the keys
that begin as the bytes found so far. No pass waits for the host: each program works out the bytes
that are known from the counts. The key found, K, and the number of scores equal to it that must go,
E, are exact; the last two passes rank the equal ones by their flat index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import words_per_row
from ._helpers import on_device, programs, word_elements
from .select import flag_nan, nan_flag, raise_if_nan, sort_keys, store_words

_CHUNK = 4096  # scores a program counts at a time
_WORDS = 64  # per program of the last passes
_BYTES = tl.constexpr(4)
_BINS = tl.constexpr(256)


def select_topk(scores: Tensor, drop: int, absolute: bool, name: str = "scores") -> Tensor:
    rows, cols = scores.shape
    words = scores.new_empty((rows, words_per_row(cols)), dtype=torch.int32)
    if words.numel() == 0:
        return words
    scores = scores.contiguous()
    flag = nan_flag(scores.device)
    counts = torch.zeros((_BYTES.value, _BINS.value), dtype=torch.int64, device=scores.device)
    blocks = triton.cdiv(words.numel(), _WORDS)
    equals = counts.new_empty(blocks)
    grid = min(triton.cdiv(scores.numel(), _CHUNK), 2 * programs(scores))
    shape = (rows, cols, words.shape[1])
    with on_device(scores):
        for byte in range(_BYTES.value):
            _count_kernel[(grid,)](
                scores, counts, flag, drop, scores.numel(), absolute, byte, _CHUNK
            )
        _count_equals_kernel[(blocks,)](scores, counts, equals, drop, *shape, absolute, _WORDS)
        before = equals.cumsum(0) - equals
        _select_topk_kernel[(blocks,)](
            scores, words, counts, before, drop, *shape, absolute, _WORDS
        )
    raise_if_nan(scores.device, name)
    return words


@triton.jit
def _found(counts, drop, BYTES: tl.constexpr):
    """The first BYTES bytes of K, and how many keys that begin with them must go."""
    key = tl.zeros((), tl.uint32)
    left = drop + tl.zeros((), tl.int64)
    bins = tl.arange(0, _BINS)
    for byte in tl.static_range(BYTES):
        count = tl.load(counts + byte * _BINS + bins)
        # Bins that go as a whole. When all scores go there is no K; the last bin then loses all.
        whole = (tl.cumsum(count, axis=0) <= left) & (bins < _BINS - 1)
        digit = tl.sum(whole.to(tl.int32), axis=0)
        left -= tl.sum(tl.where(bins < digit, count, 0), axis=0)
        key = key * _BINS + digit.to(tl.uint32)
    return key, left


@triton.jit
def _count_kernel(
    scores,
    counts,
    flag,
    drop,
    total,
    ABSOLUTE: tl.constexpr,
    BYTE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    known, _left = _found(counts, drop, BYTE)
    count = tl.zeros((_BINS,), tl.int32)
    step = tl.num_programs(0).to(tl.int64) * CHUNK
    for start in range(tl.program_id(0).to(tl.int64) * CHUNK, total, step):
        index = start + tl.arange(0, CHUNK)
        ok = index < total
        score = tl.load(scores + index, mask=ok, other=0.0).to(tl.float32)
        if BYTE == 0:
            flag_nan(flag, score, index, ok)
        key = sort_keys(score, ABSOLUTE)
        if BYTE > 0:
            ok &= (key >> (32 - 8 * BYTE)) == known
        digit = (key >> (24 - 8 * BYTE)) & (_BINS - 1)
        count += tl.histogram(digit.to(tl.int32), _BINS, mask=ok)
    tl.atomic_add(counts + BYTE * _BINS + tl.arange(0, _BINS), count.to(tl.int64), mask=count > 0)


@triton.jit
def _load_keys(scores, rows, cols, words_per_row, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Keys [BLOCK, 32] of this program's words, in flat order."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, col, ok = word_elements(first, rows, cols, words_per_row, BLOCK)
    score = tl.load(scores + row[:, None] * cols + col, mask=ok, other=0.0)
    return sort_keys(score, ABSOLUTE), ok


@triton.jit
def _count_equals_kernel(
    scores,
    counts,
    equals,
    drop,
    rows,
    cols,
    words_per_row,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kth, _left = _found(counts, drop, _BYTES)
    key, ok = _load_keys(scores, rows, cols, words_per_row, ABSOLUTE, BLOCK)
    equal = (ok & (key == kth)).to(tl.int32).reshape(BLOCK * 32)
    tl.store(equals + tl.program_id(0), tl.sum(equal, axis=0).to(tl.int64))


@triton.jit
def _select_topk_kernel(
    scores,
    words,
    counts,
    before,
    drop,
    rows,
    cols,
    words_per_row,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kth, left = _found(counts, drop, _BYTES)
    key, ok = _load_keys(scores, rows, cols, words_per_row, ABSOLUTE, BLOCK)
    equal = (ok & (key == kth)).to(tl.int32)
    in_word = tl.sum(equal, axis=1)
    rank = tl.cumsum(equal, axis=1) - equal + (tl.cumsum(in_word, axis=0) - in_word)[:, None]
    goes = (key < kth) | ((key == kth) & (tl.load(before + tl.program_id(0)) + rank < left))
    store_words(words, ok & ~goes, rows * words_per_row, BLOCK)
