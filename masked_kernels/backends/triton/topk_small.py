"""select_topk of small layers: one launch for all of them, one program a layer.

K, the key of the first score that is kept, is built bit by bit: a bit stands if no more keys are
below it than scores must go. The keys stay in registers, so that a step costs a comparison and an
addition a key. Of more scores than there are registers for, two ranks of a sample bound K, and the
keys between these bounds are put aside and searched. Where K is not between them, or too many keys
are, each step goes over the scores in memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import tl_dtype
from .layers import is_flat, ranks, word_indices
from .select import NAN_LAYER, flag_nan, nan_flag, sort_keys, store_words

_AT_ONCE = 32  # layers of one launch
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 19}  # of a key that may be set
_DEVIATIONS = tl.constexpr(4)  # of a rank in the sample, to either side
BOUND_BITS = tl.constexpr(20)  # of the bounds that are worked out

_NONE = tl.constexpr(2**31 - 1)

_SCORES = tl.constexpr(0)  # address
_WORDS = tl.constexpr(1)  # address
_NUMEL = tl.constexpr(2)
_COLS = tl.constexpr(3)
_DROP = tl.constexpr(4)
_NAME = tl.constexpr(5)


def select_small(jobs: Sequence[tuple[int, Tensor, Tensor, int]], absolute: bool) -> None:
    """Fill the words of layers on one device and of one dtype, the current device; a job as in
    ``topk.py``.
    """
    for first in range(0, len(jobs), _AT_ONCE):
        _launch(jobs[first : first + _AT_ONCE], absolute)


def _launch(jobs: Sequence[tuple[int, Tensor, Tensor, int]], absolute: bool) -> None:
    scores = [s for _, s, _, _ in jobs]
    most = max(s.numel() for s in scores)
    tile = config.small_topk_tile(most)
    facts = [
        (s.data_ptr(), w.data_ptr(), s.numel(), s.shape[1], drop, name) for name, s, w, drop in jobs
    ]
    layers = 1 if len(facts) == 1 else _AT_ONCE  # two numbers of them to compile for
    bits = _BITS[scores[0].dtype]
    room = len(jobs) * tile.scores if most > tile.scores else 0
    aside = scores[0].new_empty(room, dtype=torch.int32)
    _small_topk_kernel[(len(jobs),)](
        tuple(facts + facts[:1] * (layers - len(facts))),
        aside,
        nan_flag(aside.device),
        tl_dtype(scores[0].dtype),
        absolute,
        bits,
        max(bits - BOUND_BITS.value, 0),
        all(map(is_flat, scores)),
        tile.scores,
        num_warps=tile.warps,
    )


@triton.jit(do_not_specialize=["layers"])
def _small_topk_kernel(
    layers,
    aside,
    flag,
    SCORE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BITS: tl.constexpr,
    BOUND_LAST: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scores = _fact(layers, _SCORES).to(tl.pointer_type(SCORE))
    numel = _fact(layers, _NUMEL).to(tl.int32)
    if FLAT:
        scores, numel = tl.multiple_of(scores, 16), tl.multiple_of(numel, 16)
    drop = _fact(layers, _DROP).to(tl.int32)
    name = _fact(layers, _NAME) * NAN_LAYER
    if numel <= BLOCK:
        index = tl.arange(0, BLOCK)
        key, score, ok = _load_keys(scores, index, index < numel, ABSOLUTE, BITS)
        flag_nan(flag, name + index, ok & (score != score))
        kth, below = _search(key, drop, ABSOLUTE, BITS, 0)
    else:
        aside += tl.program_id(0) * BLOCK
        kth, below = _search_many(
            scores, numel, drop, aside, flag, name, ABSOLUTE, BITS, BOUND_LAST, BLOCK
        )
    left = drop - below
    cols = _fact(layers, _COLS).to(tl.int32)
    words = _fact(layers, _WORDS).to(tl.pointer_type(tl.int32))
    count = numel // cols * tl.cdiv(cols, 32)
    earlier = tl.zeros((), tl.int32)
    for block in range(tl.cdiv(count, BLOCK // 32)):
        index, ok = word_indices(block, numel, cols, FLAT, BLOCK // 32)
        key, _score, _ok = _load_keys(scores, index, ok, ABSOLUTE, BITS)
        goes = key < kth
        if left > 0:
            equal = (ok & (key == kth)).to(tl.int32)
            goes |= (equal != 0) & (earlier + ranks(equal) < left)
            earlier += tl.sum(tl.sum(equal, axis=1), axis=0)
        store_words(words, block, ok & (goes == 0), count, BLOCK // 32)


@triton.jit
def _fact(layers, FIELD: tl.constexpr):
    """Of this program's layer."""
    value = tl.cast(layers[0][FIELD], tl.int64)
    for i in tl.static_range(1, len(layers)):
        value = tl.where(tl.program_id(0) == i, tl.cast(layers[i][FIELD], tl.int64), value)
    return value


@triton.jit
def _load_keys(scores, index, ok, ABSOLUTE: tl.constexpr, BITS: tl.constexpr):
    """Keys of BITS bits, the highest where there is no score, with the scores and ``ok``."""
    score = tl.load(scores + index, mask=ok, other=0.0).to(tl.float32)
    key = tl.where(ok, sort_keys(score, ABSOLUTE), 0xFFFFFFFF)
    return key >> (32 - BITS), score, ok


@triton.jit
def _search(key, drop, ABSOLUTE: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr):
    """K of keys in registers down to its bit LAST, and how many keys are below it."""
    kth = tl.zeros((), tl.uint32)
    below = tl.zeros((), tl.int32)
    for step in range(BITS - ABSOLUTE - LAST):
        tried = kth | (tl.full((), 1 << (BITS - 1 - ABSOLUTE), tl.uint32) >> step)
        count = tl.sum((key < tried).to(tl.int32), axis=0)
        kth, below = _advance(kth, below, tried, count, drop)
    return kth, below


@triton.jit
def _advance(kth, below, tried, count, drop):
    stands = count <= drop
    return tl.where(stands, tried, kth), tl.where(stands, count, below)


@triton.jit
def _search_many(
    scores,
    numel,
    drop,
    aside,
    flag,
    name,
    ABSOLUTE: tl.constexpr,
    BITS: tl.constexpr,
    BOUND_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """K of more keys than registers hold, and how many are below it."""
    low, high = sampled_bounds(scores, numel, drop, ABSOLUTE, BITS, BOUND_LAST, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    inside = tl.zeros((BLOCK,), tl.int32)
    nan = tl.full((BLOCK,), _NONE, tl.int32)
    for first in range(0, numel, BLOCK):
        index = first + tl.arange(0, BLOCK)
        key, score, ok = _load_keys(scores, index, index < numel, ABSOLUTE, BITS)
        nan = tl.where(score != score, tl.minimum(nan, index), nan)
        lower += (key < low).to(tl.int32)
        inside += (ok & (key >= low) & (key <= high)).to(tl.int32)
    flag_nan(flag, name + nan, nan < _NONE)
    below, taken = tl.sum(lower, axis=0), tl.sum(inside, axis=0)
    if (below <= drop) & (drop < below + taken) & (taken <= BLOCK):
        at = tl.cumsum(inside, axis=0) - inside  # the scores of each lane follow each other
        for first in range(0, numel, BLOCK):
            index = first + tl.arange(0, BLOCK)
            key, _score, ok = _load_keys(scores, index, index < numel, ABSOLUTE, BITS)
            there = ok & (key >= low) & (key <= high)
            tl.store(aside + at, key.to(tl.int32, bitcast=True), mask=there)
            at += there.to(tl.int32)
        tl.debug_barrier()  # what is read next other threads have stored
        index = tl.arange(0, BLOCK)
        key = tl.load(aside + index, mask=index < taken, other=-1).to(tl.uint32, bitcast=True)
        kth, inside_below = _search(key, drop - below, ABSOLUTE, BITS, 0)
        below += inside_below
    else:
        kth, below = _search_memory(scores, numel, drop, ABSOLUTE, BITS, BLOCK)
    return kth, below


@triton.jit
def sampled_bounds(
    scores,
    numel,
    drop,
    ABSOLUTE: tl.constexpr,
    BITS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys between which K is likely to be, by a sample that has one score of every stratum."""
    sample = tl.arange(0, BLOCK)
    spread = ((sample * 40503) & 0xFFFF) * (numel // BLOCK) >> 16  # no stride that columns share
    index = sample.to(tl.int64) * numel // BLOCK + spread
    key, _score, _ok = _load_keys(scores, index, index < numel, ABSOLUTE, BITS)
    share = drop.to(tl.float32) / numel
    deviation = tl.sqrt(share * (1 - share) * BLOCK)
    reach = (deviation * _DEVIATIONS).to(tl.int32) + 1
    rank = (share * BLOCK).to(tl.int32)
    low, _below = _search(key, rank - reach, ABSOLUTE, BITS, LAST)
    high, _below = _search(key, rank + reach, ABSOLUTE, BITS, LAST)
    return low, high | ((tl.full((), 1, tl.uint32) << LAST) - 1)


@triton.jit
def _search_memory(
    scores, numel, drop, ABSOLUTE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """As ``_search``, of keys in memory."""
    kth = tl.zeros((), tl.uint32)
    below = tl.zeros((), tl.int32)
    for step in range(BITS - ABSOLUTE):
        tried = kth | (tl.full((), 1 << (BITS - 1 - ABSOLUTE), tl.uint32) >> step)
        lower = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, numel, BLOCK):
            index = first + tl.arange(0, BLOCK)
            key, _score, _ok = _load_keys(scores, index, index < numel, ABSOLUTE, BITS)
            lower += (key < tried).to(tl.int32)
        kth, below = _advance(kth, below, tried, tl.sum(lower, axis=0), drop)
    return kth, below
