"""Prototype: filling, sharing, and the papers' period table."""

import copy

import oracle
import pytest
import torch
from cases import PERIODS, dense, make_weight

import masked_kernels as mk
from masked_kernels import _ops


def test_fill_against_loops() -> None:
    prototype = mk.Prototype(torch.randn(7))
    for shape in ((), (0,), (3,), (7,), (5, 3), (2, 3, 3, 3)):
        filled = prototype.fill(shape)
        assert filled.shape == torch.Size(shape)
        assert filled.flatten().tolist() == oracle.fill(prototype.values.tolist(), filled.numel())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("period", PERIODS)
def test_decode_is_exact(period: str, dtype: torch.dtype, backend: str) -> None:
    for shape in ((3, 5), (5, 31), (5, 32), (4, 33), (2, 65), (9, 129), (0, 4), (4, 0)):
        weight, mask = make_weight(period, shape, dtype), torch.rand(shape) < 0.5
        values = weight.values if isinstance(weight, mk.Prototype) else weight
        got = _ops.decode(values, _ops.pack(mask, backend), shape[1], backend)
        assert torch.equal(got, torch.where(mask, dense(weight, shape), 0))


def test_decode_drops_masked_infinities(backend: str) -> None:
    """A masked-out weight is absent, not multiplied by 0."""
    mask = torch.tensor([[True, False, True]])
    values = torch.tensor([1.0, torch.inf, 3.0])
    assert _ops.decode(values, _ops.pack(mask, backend), 3, backend).tolist() == [[1.0, 0.0, 3.0]]


@pytest.mark.parametrize(
    ("largest", "periods"),
    [
        (65_536, (65_536, 6_554, 656, 66, 7, 1)),
        (262_144, (262_144, 26_215, 2_622, 263, 27, 3)),
        (36_864, (36_864, 3_687, 369, 37, 4, 1)),
        (2_359_296, (2_359_296, 235_930, 23_593, 2_360, 236, 24)),
        (393_216, (393_216, 39_322, 3_933, 394, 40, 4)),
        (786_432, (786_432, 78_644, 7_865, 787, 79, 8)),
    ],
)
def test_period_table(largest: int, periods: tuple[int, ...]) -> None:
    """The lengths of PEMN's networks at ratios 1, 1e-1 .. 1e-5."""
    ratios = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    assert tuple(mk.prototype_period(largest, ratio) for ratio in ratios) == periods


def test_aligned_period() -> None:
    # 256 rows of 256: divisors of 256, and c * 256 for c <= 256 / 64 = 4; |768 - 656| < |512 - 656|
    assert mk.prototype_period(65_536, 1e-2, align=[256]) == 768
    assert mk.prototype_period(65_536, 1e-3, align=[256]) == 64
    assert mk.prototype_period(65_536, 1e-5, align=[256]) == 1
    assert mk.prototype_period(65_536, 1.0, align=[256]) == 1024
    # 288 divides 576 and equals 288; 576 would be 207 away
    assert mk.prototype_period(36_864, 1e-2, align=[576, 288]) == 288
    assert mk.prototype_period(36_864, 1e-2, align=[576, 25]) == 1


def test_sharing_survives_moves_and_copies() -> None:
    model = mk.models.create_model("convmixer", dim=16, depth=2, patch_size=1, in_channels=1)
    mk.mask_model_(model, mk.recipes.random_padding(1e-1))

    def buffers(m: torch.nn.Module) -> set[int]:
        return {
            layer.prototype.values.data_ptr()
            for layer in m.modules()
            if getattr(layer, "prototype", None) is not None
        }

    assert len(buffers(model)) == 1
    copied = copy.deepcopy(model)
    assert len(buffers(copied)) == 1
    assert buffers(copied) != buffers(model)
    assert len(buffers(copied.to(torch.bfloat16))) == 1
    mk.pack_model_(model)
    assert len(buffers(model)) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: mk.Prototype(torch.ones(2, 2)),
            ValueError,
            r"values: got shape \(2, 2\), expected a 1-D",
        ),
        (lambda: mk.Prototype(torch.ones(0)), ValueError, r"values: got shape \(0,\)"),
        (lambda: mk.Prototype(torch.ones(2).int()), TypeError, "values: got dtype torch.int32"),
        (lambda: mk.prototype_period(0, 0.5), ValueError, "largest: got 0"),
        (lambda: mk.prototype_period(10, 0.0), ValueError, "ratio: got 0.0"),
        (lambda: mk.prototype_period(10, 1.5), ValueError, "ratio: got 1.5"),
        (lambda: mk.prototype_period(10, 0.5, align=[]), ValueError, r"align: got \[\]"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
