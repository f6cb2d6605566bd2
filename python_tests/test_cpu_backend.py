"""Decisions of the cpu backend: which kernel runs, and what it keeps of a mask."""

import gc

import pytest
import torch

from masked_kernels import _ops, backends

if reason := backends()["cpu"]:
    pytest.skip(f"backend 'cpu' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.cpu import _relaid, aligned
from masked_kernels.backends.cpu.plan import linear_plan, row_patterns

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "period", "dtype", "isa", "plan"),
    [
        (1, 4096, 4096, 4096, F32, "avx512", "aligned"),
        (4096, 4096, 4096, 64, F32, "avx512", "aligned"),
        (8, 256, 256, 1024, F32, "avx512", "aligned"),
        (64, 256, 256, 1024, F32, "avx512", "panels"),  # fewer than 256 rows a pattern
        (8, 63, 256, 1024, F32, "avx512", "direct"),  # fewer than 16 rows a pattern
        (1, 4096, 4096, 167_773, F32, "avx512", "phased"),
        (1, 4096, 256, 10_001, F32, "avx512", "direct"),
        (8, 4096, 4096, 167_773, F32, "avx512", "direct"),
        (4096, 4096, 4096, 167_773, F32, "avx512", "panels"),
        (1, 4096, 4096, 4096 * 4096, F32, "avx512", "direct"),
        (1, 4096, 4096, 4096, F32, "avx2", "direct"),
        (1, 4096, 4096, 4096, F32, "scalar", "panels"),
        (1, 4096, 4096, 4096, F64, "avx512", "panels"),
        (1, 4096, 4096, 4096, BF16, "avx512", "aligned"),
        (512, 4096, 4096, 4096, BF16, "avx512", "panels"),
        (1, 4096, 4096, 4096 * 4096, BF16, "avx512", "panels"),
    ],
)
def test_linear_plan(tokens, rows, cols, period, dtype, isa, plan) -> None:
    assert linear_plan(tokens, rows, cols, period, dtype, isa) == plan


def test_row_patterns() -> None:
    assert row_patterns(12, 1) == row_patterns(12, 4) == row_patterns(12, 12) == 1
    assert row_patterns(12, 36) == 3
    assert row_patterns(12, 5) is row_patterns(12, 18) is None
    assert row_patterns(0, 5) == row_patterns(5, 0) == 1


def test_tiles_follow_the_words() -> None:
    """Re-laid bits are kept while the mask lives, and made anew when its words change."""
    words = _ops.pack(torch.rand(32, 64) < 0.5, "cpu")
    first = aligned._tiles(words, 64, 1)
    assert aligned._tiles(words, 64, 1) is first
    assert aligned._tiles(words, 64, 2).shape == first.shape
    words.zero_()
    assert int(aligned._tiles(words, 64, 1).abs().sum()) == 0
    with torch.inference_mode():
        fresh = _ops.pack(torch.ones(32, 64, dtype=torch.bool), "cpu")
        kept = aligned._tiles(fresh, 64, 1)
        fresh.zero_()
        assert int(aligned._tiles(fresh, 64, 1).abs().sum()) == 0
        assert int(kept.abs().sum()) > 0
    count = len(_relaid._kept)
    del words
    gc.collect()
    assert len(_relaid._kept) == count - 1
