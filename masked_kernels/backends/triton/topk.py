"""select_topk of one tensor or of all layers of a model at once: a radix search for the key of the
first score that is kept, then a pass that packs.

Passes over the scores count one byte of the keys each, most significant first, among the keys that
begin as the bytes found so far; keys of bfloat16 have two bytes, of float16 three. No pass waits
for the host: the byte that a pass found is worked out by the programs of the next one. The key
found, K, and the number of scores equal to it that must go, E, are exact. Where E is not zero, one
more pass ranks the equal ones by their flat index.

All layers of a dtype share each launch. Many scores are first split around the last threshold
(``topk_warm.py``); where that works out, the passes here are over the few that it put aside.
"""

from collections.abc import Sequence
from itertools import accumulate, repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import words_per_row
from . import config, interpreted
from ._helpers import WORDS, on_device, programs, tl_dtype
from .layers import (
    DROP,
    FIRST_COUNT,
    FIRST_WORDS,
    LAYER,
    NUMEL,
    OUT,
    SCORES,
    fact,
    is_flat,
    layer_of_program,
    layer_table,
    load_scores,
    ranks,
    words_of_layer,
)
from .select import NAN_LAYER, flag_nan, nan_flag, raise_if_nan, sort_keys, store_words
from .topk_small import select_small
from .topk_warm import warm_start

_CHUNK = 2**16 if interpreted() else 2**12  # scores a program counts at a time
_BINS = tl.constexpr(256)
_KEY_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 3}


def select_topk(scores: Tensor, drop: int, absolute: bool) -> Tensor:
    words = _new_words(scores)
    if words.numel():
        _select([(0, scores.contiguous(), words, drop)], absolute)
        with on_device(scores):
            raise_if_nan(scores.device)
    return words


def select_topk_many(scores: list[Tensor], drops: list[int], absolute: bool) -> list[Tensor]:
    words = [_new_words(s) for s in scores]
    groups: dict[tuple[torch.device, torch.dtype], list[_Job]] = {}
    for i, (s, w, drop) in enumerate(zip(scores, words, drops, strict=True), start=1):
        if w.numel():
            groups.setdefault((s.device, s.dtype), []).append((i, s.contiguous(), w, drop))
    for jobs in groups.values():
        _select(jobs, absolute)
    for some in {s.device: s for s in scores if s.numel()}.values():
        with on_device(some):
            raise_if_nan(some.device)
    return words


_Job = tuple[int, Tensor, Tensor, int]
"""A layer's name as NAN_LAYER says, contiguous scores, words to fill, and how many scores go."""


def _new_words(scores: Tensor) -> Tensor:
    rows, cols = scores.shape
    return scores.new_empty((rows, words_per_row(cols)), dtype=torch.int32)


def _select(jobs: Sequence[_Job], absolute: bool) -> None:
    """Fill the words of layers on one device and of one dtype."""
    sizes = [scores.numel() for _, scores, _, _ in jobs]
    small = [job for job, n in zip(jobs, sizes, strict=True) if config.is_small(n, max(sizes))]
    large = [job for job, n in zip(jobs, sizes, strict=True) if not config.is_small(n, max(sizes))]
    with on_device(jobs[0][1]):
        if small:
            select_small(small, absolute)
        if large:
            _select_large(large, absolute)


def _select_large(jobs: Sequence[_Job], absolute: bool) -> None:
    some = jobs[0][1]
    key_bytes = _KEY_BYTES[some.dtype]
    total = sum(s.numel() for _, s, _, _ in jobs)
    counting = [
        config.parts_of_layer(s.numel(), total, _CHUNK, 3 * programs(some) // 2)
        for _, s, _, _ in jobs
    ]
    packing = [config.cdiv(w.numel(), WORDS) for _, _, w, _ in jobs]
    first_count, first_words = ([0, *accumulate(each)] for each in (counting, packing))
    warm = None
    if config.warm_start_pays(total):
        warm = warm_start([job[1:] for job in jobs], absolute)
    facts = [
        (s.data_ptr(), w.data_ptr(), s.numel(), s.shape[1], drop, i, *firsts, *more)
        for (i, s, w, drop), *firsts, more in zip(
            jobs, first_count, first_words, warm.facts if warm else repeat(()), strict=False
        )
    ]
    # Layers that are not there begin where no program is.
    absent = (0, 0, 0, 1, 0, 0, first_count[-1], first_words[-1], *(warm.absent if warm else ()))
    aligned = all(s.data_ptr() % 16 == 0 for _, s, _, _ in jobs)
    table, layers = layer_table(facts, absent, some.device)
    counts = table.new_zeros((len(jobs), key_bytes, _BINS.value))
    found = table.new_empty((len(jobs), key_bytes + 1, 2))
    equals = table.new_zeros(first_words[-1] + 1)
    scores = (table, tl_dtype(some.dtype), layers, key_bytes, absolute)
    narrow = max(w.numel() for _, _, w, _ in jobs) < 2**26 - WORDS  # 32 scores each
    way = (all(is_flat(s) for _, s, _, _ in jobs), tl.int32 if narrow else tl.int64)
    if warm is not None:
        warm.split(table, layers, absolute, *way)
    for byte in range(key_bytes):
        _count_kernel[(first_count[-1],)](
            *scores, counts, found, nan_flag(some.device), byte, aligned, _CHUNK
        )
    _count_equals_kernel[(first_words[-1],)](*scores, counts, found, equals, *way, WORDS)
    _select_topk_kernel[(first_words[-1],)](*scores, found, equals.cumsum(0), *way, WORDS)
    if warm is not None:
        warm.finish(table, found, layers, key_bytes)


@triton.jit
def _found_before(
    table, counts, found, layer, BYTE: tl.constexpr, LAYERS: tl.constexpr, KEY_BYTES: tl.constexpr
):
    """The first BYTE bytes of K and how many keys that begin with them must go, by what the last
    pass counted and what was found before it.
    """
    if BYTE == 0:
        key = tl.zeros((), tl.int64)
        left = fact(table, DROP, layer, LAYERS)
    else:
        at = found + (layer * (KEY_BYTES + 1) + BYTE - 1) * 2
        key, left = tl.load(at), tl.load(at + 1)
        bins = tl.arange(0, _BINS)
        count = tl.load(counts + (layer * KEY_BYTES + BYTE - 1) * _BINS + bins)
        # Bins that go as a whole. When all scores go there is no K; the last bin then loses all.
        whole = (tl.cumsum(count, axis=0) <= left) & (bins < _BINS - 1)
        digit = tl.sum(whole.to(tl.int32), axis=0)
        left -= tl.sum(tl.where(bins < digit, count, 0), axis=0)
        key = key * _BINS + digit
    return key, left


@triton.jit
def _keep(found, layer, first, key, left, BYTE: tl.constexpr, KEY_BYTES: tl.constexpr):
    """Leave what was found for the pass after this; the first program of a layer does."""
    at = found + (layer * (KEY_BYTES + 1) + BYTE) * 2
    tl.store(at, key, mask=first)
    tl.store(at + 1, left, mask=first)


@triton.jit
def _count_kernel(
    table,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    counts,
    found,
    flag,
    BYTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    layer, part = layer_of_program(table, FIRST_COUNT, LAYERS)
    parts = tl.load(table + FIRST_COUNT * LAYERS + layer + 1, mask=layer + 1 < LAYERS, other=0)
    parts = tl.where(layer + 1 < LAYERS, parts, tl.num_programs(0))
    parts -= fact(table, FIRST_COUNT, layer, LAYERS)
    total = fact(table, NUMEL, layer, LAYERS)
    if part * CHUNK < total:  # else all scores have programs, as few were put aside
        known, left = _found_before(table, counts, found, layer, BYTE, LAYERS, KEY_BYTES)
        _keep(found, layer, part == 0, known, left, BYTE, KEY_BYTES)
        scores = fact(table, SCORES, layer, LAYERS).to(tl.pointer_type(SCORE))
        if ALIGNED:
            scores = tl.multiple_of(scores, 16)
        named = fact(table, LAYER, layer, LAYERS) * NAN_LAYER
        count = tl.zeros((_BINS,), tl.int32)
        for start in range(part * CHUNK, total, parts * CHUNK):
            index = start + tl.arange(0, CHUNK)
            ok = index < total
            score = tl.load(scores + index, mask=ok, other=0.0).to(tl.float32)
            if BYTE == 0:
                flag_nan(flag, named + index, ok & (score != score))
            key = sort_keys(score, ABSOLUTE)
            if BYTE > 0:
                ok &= (key >> (32 - 8 * BYTE)) == known.to(tl.uint32)
            digit = (key >> (24 - 8 * BYTE)) & (_BINS - 1)
            count += tl.histogram(digit.to(tl.int32), _BINS, mask=ok)
        at = counts + (layer * KEY_BYTES + BYTE) * _BINS + tl.arange(0, _BINS)
        tl.atomic_add(at, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _load_keys(
    table,
    layer,
    block,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys [BLOCK, 32] of a block of words, in flat order, and whether there is such a score."""
    score, ok, _index = load_scores(table, layer, block, SCORE, LAYERS, FLAT, INDEX, BLOCK)
    return sort_keys(score, ABSOLUTE) >> (32 - 8 * KEY_BYTES), ok


@triton.jit
def _count_equals_kernel(
    table,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    counts,
    found,
    equals,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each block the scores equal to K, where some of these must go."""
    layer, block = layer_of_program(table, FIRST_WORDS, LAYERS)
    kth, left = _found_before(table, counts, found, layer, KEY_BYTES, LAYERS, KEY_BYTES)
    _keep(found, layer, block == 0, kth, left, KEY_BYTES, KEY_BYTES)
    if left > 0:
        key, ok = _load_keys(
            table, layer, block, SCORE, LAYERS, KEY_BYTES, ABSOLUTE, FLAT, INDEX, BLOCK
        )
        equal = (ok & (key == kth.to(tl.uint32))).to(tl.int32).reshape(BLOCK * 32)
        tl.store(equals + 1 + tl.program_id(0), tl.sum(equal, axis=0).to(tl.int64))


@triton.jit
def _select_topk_kernel(
    table,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    found,
    before,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer, block = layer_of_program(table, FIRST_WORDS, LAYERS)
    at = found + (layer * (KEY_BYTES + 1) + KEY_BYTES) * 2
    kth, left = tl.load(at).to(tl.uint32), tl.load(at + 1)
    count = words_of_layer(table, layer, LAYERS)
    if block * BLOCK < count:  # else these scores were not put aside
        key, ok = _load_keys(
            table, layer, block, SCORE, LAYERS, KEY_BYTES, ABSOLUTE, FLAT, INDEX, BLOCK
        )
        goes = key < kth
        if left > 0:
            first = tl.load(before + tl.program_id(0) - block)
            earlier = tl.load(before + tl.program_id(0)) - first
            rank = earlier + ranks((ok & (key == kth)).to(tl.int32))
            goes = goes | ((key == kth) & (rank < left))
        words = fact(table, OUT, layer, LAYERS).to(tl.pointer_type(tl.int32))
        store_words(words, block, ok & ~goes, count, BLOCK)
