"""select_topk from the last threshold: the reference's bits, whatever the hint says."""

import math

import pytest
import torch
from torch import Tensor

from masked_kernels import _ops
from masked_kernels.backends import check_scores, forget_thresholds, why_unavailable

if reason := why_unavailable("triton"):
    pytest.skip(f"backend 'triton' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.triton import config, topk, topk_warm

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch):
    """Few scores fill several programs, blocks and rooms, and find no hints of other tests."""
    monkeypatch.setattr(config, "is_small", lambda *_: False)
    monkeypatch.setattr(config, "warm_start_pays", lambda total: True)
    monkeypatch.setattr(config, "topk_sample", lambda: 0)
    monkeypatch.setattr(topk, "_CHUNK", 1024)
    monkeypatch.setattr(topk, "WORDS", 16)
    monkeypatch.setattr(topk_warm, "_band_tile", lambda: config.BandTile(16, 4, 2, 1024))
    monkeypatch.setattr(topk_warm, "_hints", {})


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each layer of each call in turn, whether the search went over what was put aside."""
    hits: list[bool] = []
    finish = topk_warm.WarmStart.finish

    def watched(self: topk_warm.WarmStart, table: Tensor, *args: object) -> None:
        scores = table[topk_warm.SCORES.value, : len(self.facts)]
        hits.extend((scores == table[topk_warm._ASIDE.value, : len(self.facts)]).tolist())
        finish(self, table, *args)

    monkeypatch.setattr(topk_warm.WarmStart, "finish", watched)
    return hits


def check(scores: Tensor, drop: int, absolute: bool, backend: str) -> None:
    got, expected = (
        _ops.select_topk(scores, drop, absolute, name) for name in (backend, "reference")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("absolute", [True, False])
def test_scores_that_move(
    absolute: bool, dtype: torch.dtype, backend: str, hits: list[bool]
) -> None:
    """A little, not at all, and to others at the same address."""
    scores = torch.randn(24, 130).to(dtype)
    drop = 2100
    for change in (scores, 1.01 * scores, 1.01 * scores, torch.randn(24, 130) * 7 - 20):
        scores.copy_(change)
        check(scores, drop, absolute, backend)
    assert hits == [False, True, True, False]


@pytest.mark.parametrize("absolute", [True, False])
def test_ties_at_the_threshold(absolute: bool, backend: str, hits: list[bool]) -> None:
    """The lower indices of equal scores go, over the bounds of words, blocks and rooms."""
    scores = torch.randn(24, 130)
    scores[torch.rand(24, 130) < 0.02] = scores.abs().median()
    for drop in (1540, 1540, 1570, 1570):
        check(scores, drop, absolute, backend)
    assert hits == [False, True, False, True]


@pytest.mark.parametrize("absolute", [True, False])
def test_a_start_from_a_sample(
    absolute: bool, backend: str, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which misleads where half of the scores are equal, and serves each layer by itself."""
    monkeypatch.setattr(config, "topk_sample", lambda: 8192)
    monkeypatch.setattr(topk, "_CHUNK", 4096)
    monkeypatch.setattr(topk, "WORDS", 128)
    monkeypatch.setattr(topk_warm, "_band_tile", lambda: config.BandTile(128, 4, 2, 4096))
    scores = torch.randn(24, 1300)
    check(scores, 15600, absolute, backend)
    check(torch.where(scores < 0, scores, 0.5), 18000, absolute, backend)
    both = [scores.half(), 100 * scores[:16].half()]
    got, expected = (
        _ops.select_topk_many(both, [15600, 7000], absolute, name)
        for name in (backend, "reference")
    )
    assert all(map(torch.equal, got, expected))
    assert hits == [True, False, True, True]


def test_forgetting(backend: str, hits: list[bool]) -> None:
    scores = torch.randn(24, 130)
    for _ in range(2):
        check(scores, 2100, True, backend)
    forget_thresholds()
    check(scores, 2100, True, backend)
    assert hits == [False, True, False]


def test_more_in_the_band_than_room_for_them(backend: str, hits: list[bool]) -> None:
    """Everywhere, and in one room alone."""
    scores = torch.randn(24, 130)
    for equal in (scores[10:11], scores):
        equal.fill_(scores.abs().median())
        for _ in range(2):
            check(scores, 1540, True, backend)
    assert not any(hits)


@pytest.mark.parametrize("drop", [0, 1, 98, 99])
@pytest.mark.parametrize("value", [1.0, 0.0, -math.inf, math.inf])
def test_ends_of_the_order(value: float, drop: int, backend: str) -> None:
    """None, all and all but one go; K is the lowest key or the highest."""
    scores = torch.randn(3, 33)
    for absolute in (True, False):
        scores[1, 5:20] = value
        for _ in range(2):
            check(scores, drop, absolute, backend)


def test_any_hint(backend: str, hits: list[bool]) -> None:
    """Of keys that no score has, and of those that put K, of which some go, at a bound of the band
    or next to it.
    """
    scores = torch.randn(24, 130)
    scores[::5, ::9] = scores.abs().median()
    drop, reach = 1570, topk_warm._REACH.value
    key = int(scores[0, 0].view(torch.int32))
    slot = topk_warm.slot(scores, drop, True)
    bounds = (key - reach - 1, key - reach, key + reach, key + reach + 1)
    for hint in (1, 2**32 - 1, *bounds):
        topk_warm.hints(scores.device)[slot] = hint
        check(scores, drop, True, backend)
        assert topk_warm.hints(scores.device)[slot] == key
    assert hits == [False] * 3 + [True] * 2 + [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_layers(
    dtype: torch.dtype, backend: str, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that hit beside those that miss; then all of them with one hint."""
    scores = [torch.randn(shape).to(dtype) for shape in ((9, 65), (3, 0), (1, 1), (24, 130))]
    drops = [s.numel() // 2 for s in scores]

    def check_after(change: float) -> None:
        for s in scores[:3]:
            s.mul_(change)
        got, expected = (
            _ops.select_topk_many(scores, drops, True, name) for name in (backend, "reference")
        )
        assert all(map(torch.equal, got, expected))

    monkeypatch.setattr(topk_warm, "slot", lambda scores, drop, absolute: drop)
    for change in (1, 1.001, 3):
        check_after(change)
    assert hits == [False] * 3 + [True] * 3 + [False, False, True]
    monkeypatch.setattr(topk_warm, "slot", lambda *_: 5)
    for _ in range(2):
        check_after(1)


def test_a_nan_is_named(backend: str, hits: list[bool]) -> None:
    """Where the hint is good, where there is none, and where it is itself of a NaN."""
    scores = torch.randn(24, 130)
    good = scores.clone()
    check(scores, 1700, True, backend)
    for place, drop, absolute in ((1321, 1700, True), (0, 1700, False), *[(1321, 3119, True)] * 2):
        scores.view(-1)[place] = math.nan
        with pytest.raises(ValueError, match=f"scores: NaN at flat index {place};"):
            _ops.select_topk(scores, drop, absolute, backend)
            check_scores()
        scores.copy_(good)
    for _ in range(2):
        check(scores, 1700, True, backend)
    assert hits[-1]


def test_no_table_is_made_for_a_graph(
    backend: str, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would clear it with every replay; what is captured then starts cold."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert topk_warm.hints(torch.device("cuda", 99)) is None
    monkeypatch.setattr(topk_warm, "hints", lambda device: None)
    scores = torch.randn(24, 130)
    for _ in range(2):
        check(scores, 1700, True, backend)
    assert hits == []
