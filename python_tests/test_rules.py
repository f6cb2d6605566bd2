"""TopK, Threshold, NM: exact counts, ties, literal cases; every backend against loops."""

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import check_scores

SHAPES = [
    (0,),
    (1,),
    (31,),
    (33,),
    (3, 0),
    (5, 31),
    (5, 32),
    (5, 33),
    (2, 63),
    (2, 64),
    (2, 65),
    (4, 3, 3, 3),
    (70, 129),
]
DENSITIES = (0.0, 0.1, 0.5, 0.9, 1.0)
RATIOS = ((2, 4), (1, 4), (0, 3), (5, 5), (1, 1), (3, 8), (7, 40))


def select(rule: mk.Rule, scores: torch.Tensor, backend: str) -> torch.Tensor:
    with mk.use_backend(backend):
        return rule(scores).unpack()


def make_scores(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    scores = torch.randn(shape)
    if kind == "ties":
        return (scores * 2).round()  # many equals, both zeros among them
    if kind == "equal":
        return torch.full(shape, -0.25)
    if kind == "extreme":
        special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, 1e-38])
        return torch.where(torch.rand(shape) < 0.5, special[torch.randint(8, shape)], scores)
    return scores


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_against_loops(
    shape: tuple[int, ...], kind: str, density: float, backend: str
) -> None:
    scores = make_scores(kind, shape)
    for absolute in (True, False):
        mask = select(mk.TopK(density, absolute), scores, backend)
        assert mask.flatten().tolist() == oracle.topk(scores.flatten().tolist(), density, absolute)
        assert int(mask.sum()) == scores.numel() - int((1 - density) * scores.numel())


@pytest.mark.parametrize("size", [50, 3000])
def test_topk_of_a_tensor_that_moves(size: int, backend: str) -> None:
    """A backend may start where the threshold was; what it finds must not show that."""
    rule, scores = mk.TopK(0.4), torch.randn(size)
    for step in (0, 1e-3, 1e-3, 1e-1, 10, 0, 1e-3):
        scores += step * torch.randn(size)
        scores[::7] = scores[3]  # ties, now and then at the threshold
        assert torch.equal(
            select(rule, scores, backend), select(rule, scores.double(), "reference")
        )
    together = [scores, -scores[: size // 2].clone()]
    with mk.use_backend(backend):
        for words, alone in zip(rule.select_many(together), map(rule, together), strict=True):
            assert torch.equal(words, alone.words)


@pytest.mark.parametrize(("n", "m"), RATIOS, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "extreme"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_nm_against_loops(shape: tuple[int, ...], kind: str, n: int, m: int, backend: str) -> None:
    scores = make_scores(kind, shape)
    for absolute in (True, False):
        mask = select(mk.NM(n, m, absolute), scores, backend)
        rows = scores.reshape(shape[0], -1) if scores.numel() else scores
        expected = [oracle.nm(row, n, m, absolute) for row in rows.tolist()]
        assert mask.reshape(rows.shape).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threshold_is_strict(shape: tuple[int, ...], backend: str) -> None:
    for scores in (make_scores("ties", shape), make_scores("extreme", shape)):
        for threshold in (0.0, -2.0, 2.0, 0.1):
            mask = select(mk.Threshold(threshold), scores, backend)
            # Scores are compared in their own precision, as ``scores > threshold`` is in torch.
            assert torch.equal(mask, scores > threshold)


def test_literal_topk(backend: str) -> None:
    scores = torch.tensor([[0.5, -3.0, 1.0], [-0.5, 0.0, 0.5]])
    # n = 6, keeps 6 - int(3.0) = 3; |0.5| stands three times, indices 0, 3 and 5: the lower two go.
    assert select(mk.TopK(0.5), scores, backend).tolist() == [
        [False, True, True],
        [False, False, True],
    ]
    assert select(mk.TopK(0.5, absolute=False), scores, backend).tolist() == [
        [True, False, True],
        [False, False, True],
    ]


def test_literal_threshold(backend: str) -> None:
    scores = torch.tensor([0.0, 1e-3, -1.0, 5e-3])
    assert select(mk.Threshold(0.0), scores, backend).tolist() == [False, True, False, True]
    assert select(mk.Threshold(1e-3), scores, backend).tolist() == [False, False, False, True]


def test_literal_nm(backend: str) -> None:
    scores = torch.tensor([[1.0, -4.0, 2.0, 2.0, 7.0, 0.0]])
    # Groups [1 -4 2 2] and the short [7 0]; of the two 2.0 the lower index goes.
    assert select(mk.NM(2, 4), scores, backend).tolist() == [[False, True, False, True, True, True]]
    assert select(mk.NM(1, 4, absolute=False), scores, backend).tolist() == [
        [False, False, False, True, True, False]
    ]


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70),
    st.floats(0, 1),
    st.booleans(),
)
def test_topk_property(values: list[float], density: float, absolute: bool) -> None:
    scores = torch.tensor(values)
    expected = oracle.topk(scores.tolist(), density, absolute)
    for name, reason in mk.backends().items():
        if reason is None:
            assert select(mk.TopK(density, absolute), scores, name).tolist() == expected, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    scores = torch.randn(5, 33).to(dtype)
    for rule in (mk.TopK(0.3), mk.TopK(0.3, absolute=False), mk.NM(), mk.Threshold(0.25)):
        assert rule(scores) == rule(scores.double())


@pytest.mark.parametrize("rule", [mk.TopK(), mk.Threshold(), mk.NM()], ids=str)
def test_nan_is_refused(rule: mk.Rule, backend: str) -> None:
    for index in (0, 40, 98):
        scores = torch.randn(3, 33)
        scores.view(-1)[index] = math.nan
        with (
            mk.use_backend(backend),
            pytest.raises(ValueError, match=f"scores: NaN at flat index {index};"),
        ):
            rule(scores)
            check_scores()


def test_select_many_is_select_of_each(backend: str) -> None:
    """Small, large and empty layers at once, of every rule; the tensor with a NaN is named."""
    scores = [torch.randn(shape) for shape in ((64, 8, 3, 3), (3, 0), (1100, 1001), (33,), (5, 32))]
    for rule in (mk.TopK(0.3), mk.TopK(0.5, absolute=False), mk.Threshold(), mk.NM()):
        many = rule.select_many(scores, backend)
        assert all(
            torch.equal(words, rule.select(s, backend))
            for words, s in zip(many, scores, strict=True)
        )
    scores[3][7] = math.nan
    with pytest.raises(ValueError, match=r"scores\[3\]: NaN at flat index 7;"):
        mk.TopK().select_many(scores, backend)
        check_scores()
    assert mk.TopK().select_many([], backend) == []


def test_select_many_of_16_bits(backend: str) -> None:
    """Twenty layers of three dtypes, many of their scores equal."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    scores = [(3 * torch.randn(3, 5 + i)).to(dtypes[i % 3]) for i in range(20)]
    for absolute in (True, False):
        rule = mk.TopK(0.4, absolute)
        for s, words in zip(scores, rule.select_many(scores, backend), strict=True):
            expected = oracle.topk(s.flatten().tolist(), 0.4, absolute)
            assert _ops.unpack(words, s.shape[1], backend).flatten().tolist() == expected


def test_large_selection_agrees_with_a_stable_sort(backend: str) -> None:
    """Enough scores for several threads and radix passes, with and without heavy ties."""
    for scores in (torch.randn(300, 1111), (torch.randn(300, 1111) * 3).round()):
        words = _ops.select_topk(scores, 123_456, True, backend)
        order = scores.abs().flatten().argsort(stable=True)
        expected = torch.ones(scores.numel(), dtype=torch.bool)
        expected[order[:123_456]] = False
        assert torch.equal(_ops.unpack(words, 1111, backend).flatten(), expected)


def test_rescale() -> None:
    scores = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    rule = mk.Threshold(rescale=True)
    scale = rule.weight_scale(rule.select(scores), 4)
    torch.testing.assert_close(scale, torch.tensor((4 / 3) ** 0.5))
    y = mk.scored_linear(torch.ones(1, 4), torch.ones(1, 4), scores, rule)
    torch.testing.assert_close(y, torch.tensor([[3 * (4 / 3) ** 0.5]]))
    empty = mk.scored_linear(torch.ones(1, 4), torch.ones(1, 4), -scores.abs(), rule)
    assert empty.tolist() == [[0.0]]


def test_dict_round_trip_and_errors() -> None:
    for rule in (mk.TopK(0.25, absolute=False), mk.Threshold(5e-3, rescale=True), mk.NM(1, 8)):
        assert mk.Rule.from_dict(rule.to_dict()) == rule
    for call, message in (
        (lambda: mk.TopK(1.5), "density: got 1.5"),
        (lambda: mk.NM(5, 4), "n, m: got 5:4"),
        (lambda: mk.NM(0, 0), "n, m: got 0:0"),
        (
            lambda: mk.Rule.from_dict({"name": "Random"}),
            "rule: got name 'Random', expected one of TopK, Threshold, NM",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"scores: got dtype torch\.int64"):
        mk.TopK()(torch.ones(3, dtype=torch.int64))
