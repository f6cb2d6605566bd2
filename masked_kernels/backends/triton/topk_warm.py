"""A start of select_topk from the last threshold: one pass splits the scores around it and leaves
few of them for the search.

The pass sets the bits of all keys above a band around the last threshold, counts those below, and
puts the scores inside aside, in flat order: each program into a room of its own, filled up with
scores that rank below any in the band. Where K is in the band and no room was too small, the table
of layers is rewritten so that the search of ``topk.py`` goes over what was put aside, and the bits
that it finds are added to the mask last. Else the search goes over the scores as if nothing had
been done.

Where there is no last threshold the band is between two ranks of a sample.

The last threshold comes from a table of hints, one a device, made with the first use and kept. A
tensor's slot is a hash of where its scores lie and of how many go. Two tensors of one slot, or
other scores at the same address, cost a pass over the scores and never a bit of the result; so
nobody has to know when a tensor dies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, interpreted
from ._helpers import population, programs, tl_dtype
from .layers import (
    COLS,
    DROP,
    FIELDS,
    LAYER,
    NUMEL,
    OUT,
    SCORES,
    fact,
    layer_of_program,
    word_indices,
    words_of_layer,
)
from .select import NAN_LAYER, flag_nan, nan_flag, sort_keys
from .topk_small import BOUND_BITS, sampled_bounds

_SLOTS = 1 << 12
_ROOM = tl.constexpr(2)  # scores that may be put aside for each word of 32
_REACH = tl.constexpr(1 << 18)  # of the band around the hint, in keys: 1.6 to 3.1 % of a score
_BLOCK = 512  # scores put aside that are looked at at a time

_SLOT = tl.constexpr(FIELDS)  # of its hint
_SPAN = tl.constexpr(FIELDS + 1)  # words that a program of the first pass goes over
_ROOMS = tl.constexpr(FIELDS + 2)  # scores in all rooms of the layer
_ASIDE = tl.constexpr(FIELDS + 3)  # address of these
_PLACES = tl.constexpr(FIELDS + 4)  # address of their bits, counted from the span's first
_KEPT = tl.constexpr(FIELDS + 5)  # address of the words that say which of them are kept
_WORDS = tl.constexpr(FIELDS + 6)  # address of the words of the mask
_LOW = tl.constexpr(FIELDS + 7)  # lowest key of the band
_HIGH = tl.constexpr(FIELDS + 8)  # its highest key, 0 if there is no band
_UPPER = tl.constexpr(FIELDS + 9)  # scores in the band and above it
_INSIDE = tl.constexpr(FIELDS + 10)  # scores in the band
_FULL = tl.constexpr(FIELDS + 11)  # rooms that were too small
_FIRST_SPLIT = tl.constexpr(FIELDS + 12)  # its first program in the first pass

_hints: dict[torch.device, Tensor] = {}


def slot(scores: Tensor, drop: int, absolute: bool) -> int:
    """Of the hint in the table of its device."""
    return hash((scores.data_ptr(), drop, absolute)) % _SLOTS


def hints(device: torch.device) -> Tensor | None:
    """The last keys, 0 where there was none. None if a CUDA graph is being captured and the device
    has no table: the graph would own it and clear it with every replay.
    """
    if device not in _hints:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _hints[device] = torch.zeros(_SLOTS, dtype=torch.int64, device=device)
        if device.type == "cuda":  # other streams use it too
            torch.cuda.synchronize(device)
    return _hints[device]


def forget_thresholds() -> None:
    for table in _hints.values():
        table.zero_()


@dataclass(frozen=True)
class WarmStart:
    """The memory of one call, what each layer's facts gain, and those of layers that are not there.
    ``grid`` is that of the first pass and of the one that fills in its rooms.
    """

    hints: Tensor
    aside: Tensor
    facts: list[tuple[int, ...]]
    absent: tuple[int, ...]
    grid: tuple[int]
    memory: tuple[Tensor, ...]  # that the facts have the addresses of

    def split(
        self, table: Tensor, layers: int, absolute: bool, flat: bool, index: tl.dtype
    ) -> None:
        """Go over the scores, and point the table at those put aside where that is enough."""
        score, flag = tl_dtype(self.aside.dtype), nan_flag(table.device)
        _band_kernel[(len(self.facts),)](
            table, self.hints, score, layers, absolute, config.topk_sample(), num_warps=16
        )
        tile = _band_tile()
        _split_kernel[self.grid](
            *(table, score, layers, absolute, flag, flat, index, tile.words), num_warps=tile.warps
        )
        _settle_kernel[(1,)](table, layers)

    def finish(self, table: Tensor, found: Tensor, layers: int, key_bytes: int) -> None:
        """Set the bits of the scores put aside that are kept, and leave the hints."""
        _fill_kernel[self.grid](table, found, self.hints, layers, key_bytes, _BLOCK)


def _band_tile() -> config.BandTile:
    """The interpreter takes its time by the program, not by the word."""
    return config.band_tile()._replace(words=512) if interpreted() else config.band_tile()


def warm_start(jobs: Sequence[tuple[Tensor, Tensor, int]], absolute: bool) -> WarmStart | None:
    """For scores, words and drops of layers on one device."""
    some = jobs[0][0]
    table = hints(some.device)
    if table is None:
        return None
    tile = _band_tile()
    total, at_once = sum(s.numel() for s, _, _ in jobs), tile.programs * programs(some)
    parts = [config.parts_of_layer(s.numel(), total, tile.least, at_once) for s, _, _ in jobs]
    # A part is a chunk of several blocks, or all there is, so rooms fill fewer words than masks.
    sizes = [words.numel() for _, words, _ in jobs]
    spans = [
        config.cdiv(config.cdiv(size, n), tile.words) * tile.words
        for size, n in zip(sizes, parts, strict=True)
    ]
    rooms = [n * span * _ROOM.value for n, span in zip(parts, spans, strict=True)]
    first, first_split = [0, *accumulate(rooms)], [0, *accumulate(parts)]
    aside = some.new_empty(first[-1])
    places = some.new_empty(first[-1], dtype=torch.int32)
    kept = some.new_empty(first[-1] // 32, dtype=torch.int32)
    facts = [
        (
            *(slot(scores, drop, absolute), span, room),
            *(aside.data_ptr() + at * aside.itemsize, places.data_ptr() + at * 4),
            *(kept.data_ptr() + at // 8, words.data_ptr()),
            *(0, 0, 0, 0, 0, program),
        )
        for (scores, words, drop), span, room, at, program in zip(
            jobs, spans, rooms, first, first_split, strict=False
        )
    ]
    absent = (*[0] * (len(facts[0]) - 1), first_split[-1])
    return WarmStart(table, aside, facts, absent, (first_split[-1],), (places, kept))


@triton.jit
def _band_kernel(
    table,
    hints,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Once for all programs of a layer, as another stream may write the hints meanwhile."""
    layer = tl.program_id(0)
    # Scores that fill a room up have the lowest key of all; no score in the band may. The highest
    # is infinity's, as a NaN is not to be put aside.
    lowest = 0 if ABSOLUTE else 0x7FFFFF
    highest = 0x7F800000 if ABSOLUTE else 0xFF800000
    hint = tl.load(hints + fact(table, _SLOT, layer, LAYERS))
    low = tl.maximum(hint - _REACH, lowest + 1)
    high = tl.where(hint > 0, tl.minimum(hint + _REACH, highest), 0)
    if SAMPLE > 0:  # noqa: SIM102  the one is decided when this is compiled
        if hint == 0:
            scores = fact(table, SCORES, layer, LAYERS).to(tl.pointer_type(SCORE))
            numel, drop = fact(table, NUMEL, layer, LAYERS), fact(table, DROP, layer, LAYERS)
            from_key, to_key = sampled_bounds(
                scores, numel, drop, ABSOLUTE, 32, 32 - BOUND_BITS, SAMPLE
            )
            low = tl.maximum(from_key.to(tl.int64), lowest + 1)
            high = tl.minimum(to_key.to(tl.int64), highest)
    tl.store(table + _LOW * LAYERS + layer, low)
    tl.store(table + _HIGH * LAYERS + layer, high)


@triton.jit
def _split_kernel(
    table,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    flag,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer, part = layer_of_program(table, _FIRST_SPLIT, LAYERS)
    lo = fact(table, _LOW, layer, LAYERS).to(tl.uint32)
    hi = fact(table, _HIGH, layer, LAYERS).to(tl.uint32)
    if hi > 0:
        named = fact(table, LAYER, layer, LAYERS) * NAN_LAYER
        scores = fact(table, SCORES, layer, LAYERS).to(tl.pointer_type(SCORE))
        words = fact(table, OUT, layer, LAYERS).to(tl.pointer_type(tl.int32))
        numel = fact(table, NUMEL, layer, LAYERS).to(INDEX)
        cols = fact(table, COLS, layer, LAYERS).to(INDEX)
        if FLAT:
            scores, numel = tl.multiple_of(scores, 16), tl.multiple_of(numel, 16)
        count = words_of_layer(table, layer, LAYERS)
        span = fact(table, _SPAN, layer, LAYERS)
        room = (span * _ROOM).to(tl.int32)
        aside = fact(table, _ASIDE, layer, LAYERS).to(tl.pointer_type(SCORE)) + part * room
        places = fact(table, _PLACES, layer, LAYERS).to(tl.pointer_type(tl.int32)) + part * room
        lane = tl.arange(0, 32)[None, :]
        bit = 1 << lane
        upper = tl.zeros((BLOCK,), tl.int32)
        taken = tl.zeros((), tl.int32)
        begin = part * span
        index, ok = word_indices(tl.cast(begin // BLOCK, INDEX), numel, cols, FLAT, BLOCK)
        ahead = tl.load(scores + index, mask=ok, other=0.0)
        for first in range(begin, tl.minimum(begin + span, count), BLOCK):
            # Loads of the next block travel while this one is worked on.
            score = ahead
            block = tl.cast(first // BLOCK, INDEX)
            index, ok = word_indices(block + 1, numel, cols, FLAT, BLOCK)
            ahead = tl.load(scores + index, mask=ok, other=0.0)
            index, ok = word_indices(block, numel, cols, FLAT, BLOCK)
            value = score.to(tl.float32)
            nan = (value != value).to(tl.int32)
            if tl.max(tl.max(nan, axis=1), axis=0) > 0:
                flag_nan(flag, named + index, nan > 0)
            key = sort_keys(value, ABSOLUTE)
            not_below, above = ok & (key >= lo), ok & (key > hi)
            above_bits = tl.sum(tl.where(above, bit, 0), axis=1)
            upper_bits = tl.sum(tl.where(not_below, bit, 0), axis=1)
            word = first + tl.arange(0, BLOCK)
            tl.store(words + word, above_bits, mask=word < count)
            upper += population(upper_bits)
            bits = upper_bits ^ above_bits  # of the scores inside the band
            many = population(bits)
            at = (taken + tl.cumsum(many, axis=0) - many)[:, None]
            at += population(bits[:, None] & (bit - 1))  # those before each in its word
            there = not_below & ~above & (at < room)
            tl.store(aside + at, score, mask=there)
            tl.store(places + at, (word - begin).to(tl.int32)[:, None] * 32 + lane, mask=there)
            taken += tl.sum(many, axis=0)
        filler = 0.0 if ABSOLUTE else -float("inf")
        for start in range(taken // BLOCK * BLOCK, room, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(aside + at, filler, mask=(at >= taken) & (at < room))
        counts = table + layer
        tl.atomic_add(counts + _UPPER * LAYERS, tl.sum(upper, axis=0).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + _INSIDE * LAYERS, taken.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + _FULL * LAYERS, 1, mask=taken > room, sem="relaxed")


@triton.jit
def _settle_kernel(table, LAYERS: tl.constexpr):
    """Let the search go over the scores put aside in those layers whose K is among them."""
    layer = tl.arange(0, LAYERS)
    below = fact(table, NUMEL, layer, LAYERS) - fact(table, _UPPER, layer, LAYERS)
    inside = fact(table, _INSIDE, layer, LAYERS)
    drop, full = fact(table, DROP, layer, LAYERS), fact(table, _FULL, layer, LAYERS)
    hit = (full == 0) & (below <= drop) & (drop < below + inside)
    rooms = fact(table, _ROOMS, layer, LAYERS)
    tl.store(table + SCORES * LAYERS + layer, fact(table, _ASIDE, layer, LAYERS), mask=hit)
    tl.store(table + OUT * LAYERS + layer, fact(table, _KEPT, layer, LAYERS), mask=hit)
    tl.store(table + NUMEL * LAYERS + layer, rooms, mask=hit)
    tl.store(table + COLS * LAYERS + layer, rooms, mask=hit)
    tl.store(table + DROP * LAYERS + layer, drop - below + rooms - inside, mask=hit)


@triton.jit
def _fill_kernel(
    table, found, hints, LAYERS: tl.constexpr, KEY_BYTES: tl.constexpr, BLOCK: tl.constexpr
):
    layer, part = layer_of_program(table, _FIRST_SPLIT, LAYERS)
    if fact(table, SCORES, layer, LAYERS) == fact(table, _ASIDE, layer, LAYERS):
        kept = fact(table, _KEPT, layer, LAYERS).to(tl.pointer_type(tl.int32))
        places = fact(table, _PLACES, layer, LAYERS).to(tl.pointer_type(tl.int32))
        span = fact(table, _SPAN, layer, LAYERS)
        words = fact(table, _WORDS, layer, LAYERS).to(tl.pointer_type(tl.int32)) + part * span
        room = span * _ROOM
        for start in range(0, room, BLOCK):
            in_room = start + tl.arange(0, BLOCK)
            at = part * room + in_room
            word = tl.load(kept + at // 32, mask=in_room < room, other=0)
            keep = ((word >> (at % 32).to(tl.int32)) & 1) != 0
            place = tl.load(places + at, mask=keep, other=0)
            tl.atomic_or(words + place // 32, 1 << place % 32, mask=keep, sem="relaxed")
    key = tl.load(found + (layer * (KEY_BYTES + 1) + KEY_BYTES) * 2) << (32 - 8 * KEY_BYTES)
    tl.store(hints + fact(table, _SLOT, layer, LAYERS), key, mask=part == 0)
