"""select_topk of small layers: the reference's bits, however few keys registers hold."""

import math

import pytest
import torch

from masked_kernels import _ops
from masked_kernels.backends import check_scores, why_unavailable

if reason := why_unavailable("triton"):
    pytest.skip(f"backend 'triton' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.triton import config

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def _few_registers(monkeypatch: pytest.MonkeyPatch):
    """Few scores are sampled and put aside."""
    tile = config.SmallTopkTile(scores=256, warps=4)
    monkeypatch.setattr(config, "small_topk_tile", lambda numel: tile)


def check(scores: torch.Tensor, drop: int, absolute: bool, backend: str) -> None:
    got, expected = (
        _ops.select_topk(scores, drop, absolute, name) for name in (backend, "reference")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9, 33), (1, 401), (16, 32)], ids=str)
@pytest.mark.parametrize("absolute", [True, False])
def test_any_count(
    absolute: bool, shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    """By what was put aside, and by all scores: where many equal K, and at the ends."""
    scores = torch.randn(shape).to(dtype)
    numel = scores.numel()
    for kind in (scores, (2 * scores).round(), torch.full_like(scores, -0.5)):
        for drop in (0, numel // 3, numel):
            check(kind, drop, absolute, backend)


def test_a_sample_that_misleads(backend: str) -> None:
    """Its strata hold one large score each, which it does or does not meet."""
    scores = torch.rand(16, 32)
    for place in (0, 1):
        scores.view(-1)[place::2] += 5
        check(scores, 200, True, backend)
        check(scores, 300, True, backend)


def test_layers_of_one_launch(backend: str) -> None:
    """More of them than it takes, some that registers hold; the first NaN is named."""
    scores = [torch.randn(2 + i, 37) for i in range(18)]
    drops = [s.numel() // 2 for s in scores]
    got, expected = (
        _ops.select_topk_many(scores, drops, False, name) for name in (backend, "reference")
    )
    assert all(map(torch.equal, got, expected))
    for layer, place in ((17, 600), (17, 300), (16, 5)):
        scores[layer].view(-1)[place] = math.nan
        with pytest.raises(ValueError, match=rf"scores\[{layer}\]: NaN at flat index {place};"):
            _ops.select_topk_many(scores, drops, False, backend)
            check_scores()
