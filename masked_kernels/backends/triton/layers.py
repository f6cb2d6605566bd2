"""What the kernels of a top-k know about the layers that share their launches: a table on the
device of where each lies, how large it is and which programs work for it.

A kernel writes the table from its own arguments rather than the host by a copy, so that a CUDA
graph keeps the addresses that it was captured with.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import word_elements

_AT_ONCE = 16  # layers whose facts one launch writes

# Fields, each of them for all layers one after the other; topk_warm.py appends its own.
SCORES = tl.constexpr(0)  # address
OUT = tl.constexpr(1)  # address of the words
NUMEL = tl.constexpr(2)
COLS = tl.constexpr(3)
DROP = tl.constexpr(4)
LAYER = tl.constexpr(5)  # its name, as NAN_LAYER says
FIRST_COUNT = tl.constexpr(6)  # its first program in the counting passes
FIRST_WORDS = tl.constexpr(7)  # its first program in the last passes
FIELDS = 8


def is_flat(scores: Tensor) -> bool:
    """Whether words follow each other in flat order, as rows are of whole words or there is one,
    and 16 bytes of scores can be loaded at a time.
    """
    rows, cols = scores.shape
    whole = cols % 32 == 0 or (rows == 1 and cols % 16 == 0)
    return whole and scores.data_ptr() % 16 == 0


def layer_table(
    facts: Sequence[tuple[int, ...]], absent: tuple[int, ...], device: torch.device
) -> tuple[Tensor, int]:
    """The table of the fields of each layer, and for how many layers it is, a power of two; those
    that are not there have the fields ``absent``. To be called with the device current.
    """
    at_once = 1 if len(facts) == 1 else _AT_ONCE
    layers = config.next_power_of_2(config.cdiv(len(facts), at_once) * at_once)
    facts = [*facts, *[absent] * (layers - len(facts))]
    table = torch.empty((len(absent), layers), dtype=torch.int64, device=device)
    for first in range(0, layers, at_once):
        some = tuple(facts[first : first + at_once])
        _table_kernel[(1,)](table, first, layers, len(absent), some)
    return table, layers


@triton.jit(do_not_specialize=["facts"])
def _table_kernel(table, first, LAYERS: tl.constexpr, FIELDS: tl.constexpr, facts):
    """The columns of some layers."""
    for i in tl.static_range(len(facts)):
        for field in tl.static_range(FIELDS):
            tl.store(table + field * LAYERS + first + i, tl.cast(facts[i][field], tl.int64))


@triton.jit
def fact(table, FIELD: tl.constexpr, layer, LAYERS: tl.constexpr):
    return tl.load(table + FIELD * LAYERS + layer)


@triton.jit
def layer_of_program(table, FIRST: tl.constexpr, LAYERS: tl.constexpr):
    """Which layer this program works for, and its number among those that do."""
    first = tl.load(table + FIRST * LAYERS + tl.arange(0, LAYERS))
    layer = tl.sum((first <= tl.program_id(0)).to(tl.int32), axis=0) - 1
    return layer, tl.program_id(0) - fact(table, FIRST, layer, LAYERS)


@triton.jit
def load_scores(
    table,
    layer,
    block,
    SCORE: tl.constexpr,
    LAYERS: tl.constexpr,
    FLAT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores [BLOCK, 32] of a block of words, whether there is such a score, and flat indices.
    FLAT as ``is_flat`` says, INDEX the integers to compute in.
    """
    scores = fact(table, SCORES, layer, LAYERS).to(tl.pointer_type(SCORE))
    numel = fact(table, NUMEL, layer, LAYERS).to(INDEX)
    cols = fact(table, COLS, layer, LAYERS).to(INDEX)
    if FLAT:
        scores, numel = tl.multiple_of(scores, 16), tl.multiple_of(numel, 16)
    index, ok = word_indices(tl.cast(block, INDEX), numel, cols, FLAT, BLOCK)
    return tl.load(scores + index, mask=ok, other=0.0), ok, index


@triton.jit
def word_indices(block, numel, cols, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Flat indices [BLOCK, 32] of the scores of a block of words, and whether there is such a
    score. FLAT if words follow each other in flat order.
    """
    if FLAT:
        word = block * BLOCK + tl.arange(0, BLOCK)
        index = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        ok = index < numel
    else:
        rows = numel // cols
        row, col, ok = word_elements(block * BLOCK, rows, cols, tl.cdiv(cols, 32), BLOCK)
        index = row[:, None] * cols + col
    return index, ok


@triton.jit
def words_of_layer(table, layer, LAYERS: tl.constexpr):
    """How many words the mask of a layer has."""
    cols = fact(table, COLS, layer, LAYERS)
    return fact(table, NUMEL, layer, LAYERS) // cols * tl.cdiv(cols, 32)


@triton.jit
def ranks(marked):
    """How many of the marked elements [A, 32], ones among zeros, come before each in flat order."""
    in_word = tl.sum(marked, axis=1)
    return tl.cumsum(marked, axis=1) - marked + (tl.cumsum(in_word, axis=0) - in_word)[:, None]
