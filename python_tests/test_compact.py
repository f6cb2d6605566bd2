"""CompactLinear: a dense weight without what its mask drops."""

import copy
from pathlib import Path

import pytest
import torch
from cases import assert_within
from torch import nn

import masked_kernels as mk
from masked_kernels import _ops


def masked(inputs: int, outputs: int, density: float = 0.5, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(inputs + outputs)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias))
    mk.mask_model_(model, mk.recipes.edge_popup(density))
    return model


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 5, 17])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (31, 5), (64, 4), (65, 33)])
def test_same_outputs(inputs: int, outputs: int, tokens: int, density: float, backend: str) -> None:
    model = masked(inputs, outputs, density, bias=tokens != 5)
    x = torch.randn(tokens, inputs)
    plain = copy.deepcopy(model)
    mk.materialize_(plain)
    mk.pack_model_(model, compact=True)
    assert type(model[0]) is mk.nn.CompactLinear
    with torch.no_grad(), mk.use_backend(backend):
        assert_within("y", model(x), plain(x), plain.double()(x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("backend 'triton' has no float64")
    model = masked(65, 33)
    mk.pack_model_(model, compact=True)
    model = model.to(dtype)
    plain = copy.deepcopy(model)
    mk.materialize_(plain)
    x = torch.randn(3, 65, dtype=dtype)
    with torch.no_grad(), mk.use_backend(backend):
        assert_within("y", model(x), plain(x), plain.double()(x.double()))


def test_keeps_half(tmp_path: Path) -> None:
    model = masked(64, 32)
    weight, mask = model[0].weight.detach().clone(), model[0].mask
    x = torch.randn(2, 64)
    expected = model.eval()(x)
    report = mk.pack_model_(model, compact=True)
    assert list(report.converted) == ["0"] and "1024 kept" in report.converted["0"]
    layer = model[0]
    assert not layer.training and layer.weight is None
    assert layer.kept.shape == (64 * 32 // 2,)
    assert torch.equal(layer.kept, weight[mask.unpack()])
    assert torch.equal(layer.values, torch.where(mask.unpack(), weight, 0))

    table = mk.summary(model)
    assert (table.layers[0].values, table.value_bytes) == ("1024 kept", 4 * 1024)

    assert mk.save_masked(model, tmp_path / "model.mk").values == 1024
    loaded = mk.load_masked(tmp_path / "model.mk", into=masked(64, 32))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected.detach())
        again = mk.load_masked(tmp_path / "model.mk", into=copy.deepcopy(model))
        torch.testing.assert_close(again(x), expected.detach())


def test_prototypes_and_convolutions_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    mk.mask_model_(model, mk.recipes.random_padding(0.1))
    mk.pack_model_(model, compact=True)
    assert type(model[2]) is mk.nn.PackedLinear
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    mk.mask_model_(model, mk.recipes.edge_popup())
    mk.pack_model_(model, compact=True)
    assert [type(m) for m in model] == [mk.nn.PackedConv2d, nn.Flatten, mk.nn.CompactLinear]


def test_errors(backend: str) -> None:
    model = masked(8, 4, bias=False)
    mk.pack_model_(model, compact=True)
    with pytest.raises(RuntimeError, match=r"compact_linear: got an input that requires grad"):
        model(torch.randn(1, 8, requires_grad=True))
    words = model[0].words
    for count in (15, 17):
        with pytest.raises(ValueError, match=rf"kept: got {count} values, expected 16"):
            _ops.compact_linear(torch.randn(1, 8), torch.randn(count), words, None, None, backend)
    with pytest.raises(ValueError, match=r"kept: got shape \(2, 8\), expected 1 dimension"):
        mk.functional.compact_linear(torch.randn(1, 8), torch.randn(2, 8), model[0].mask)
