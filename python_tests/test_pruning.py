"""Pruning at initialisation: exact masks, and training that moves the kept weights alone."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels.nn.pruned import prune_layer

BLOCKS = (f"blocks.{i}.{part}.0" for i in (0, 1) for part in ("depthwise", "pointwise"))
LAYERS = ("stem.0", *BLOCKS, "head")


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    return mk.models.create_model("convmixer", dim=16, depth=2, in_channels=1).to(dtype)


def pruned_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (mk.nn.PrunedLinear, mk.nn.PrunedConv2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.mask.unpack() for name, layer in pruned_layers(model).items()}


@pytest.mark.parametrize("density", (0.0, 0.04, 1 / 3, 0.9, 1.0))
@pytest.mark.parametrize("method", ("random", "magnitude"))
def test_counts_are_exact(method: str, density: float) -> None:
    model = small()
    mk.pruning.prune_model_(model, method, density=density)
    layers = pruned_layers(model).values()
    for layer in layers:
        size = layer.weight.numel()
        assert layer.mask.count() == size - int((1 - density) * size)

    model = small()
    mk.pruning.prune_model_(model, method, density=density, scope="global")
    layers = pruned_layers(model).values()
    size = sum(layer.weight.numel() for layer in layers)
    assert sum(layer.mask.count() for layer in layers) == size - int((1 - density) * size)


def test_magnitude_keeps_the_largest() -> None:
    model = small()
    plain = {n: m.weight.detach().clone() for n, m in model.named_modules() if n in LAYERS}
    layerwise, everywhere = copy.deepcopy(model), copy.deepcopy(model)
    mk.pruning.prune_model_(layerwise, "magnitude", density=0.1)
    mk.pruning.prune_model_(everywhere, "magnitude", density=0.1, scope="global")
    together = torch.cat([w.abs().flatten() for w in plain.values()])
    threshold = together.sort(descending=True).values[mk.TopK(0.1)(together).count() - 1]
    for name, weight in plain.items():
        assert torch.equal(masks(everywhere)[name], weight.abs() >= threshold)
        kept = masks(layerwise)[name]
        assert weight[kept].abs().min() > weight[~kept].abs().max()
        assert torch.equal(layerwise.get_submodule(name).weight, torch.where(kept, weight, 0))


def test_random_depends_on_the_seed_alone() -> None:
    def draw(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        model = small()
        before = torch.get_rng_state()
        report = mk.pruning.prune_model_(model, "random", density=0.3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert tuple(report.converted) == LAYERS
        return masks(model)

    first, again, other = draw(1, 1), draw(1, 2), draw(2, 1)
    assert all(torch.equal(first[name], again[name]) for name in LAYERS)
    assert not any(torch.equal(first[name], other[name]) for name in LAYERS)
    equal_shapes = "blocks.0.pointwise.0", "blocks.1.pointwise.0"
    assert not torch.equal(*(first[name] for name in equal_shapes))


def test_literal_random_mask() -> None:
    """Pins the seed's meaning: a change here makes published seeds useless."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    mk.pruning.prune_model_(model, "random", density=0.5, seed=0)
    assert model[0].mask.unpack().tolist() == LITERAL_MASK


LITERAL_MASK = [[False, False, True, True], [True, False, False, True]]


def test_random_masks_are_uniform() -> None:
    """Every weight is kept in about ``density`` of the draws."""
    kept = torch.zeros(6, 5)
    for seed in range(400):
        model = nn.Sequential(nn.Linear(5, 6))
        mk.pruning.prune_model_(model, "random", density=0.3, seed=seed)
        kept += model[0].mask.unpack()
    assert (kept / 400 - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 400)


@pytest.mark.parametrize("name", ("sgd", "adamw"))
def test_training_moves_the_kept_weights_alone(name: str) -> None:
    """As a plain model does whose dropped weights and their gradients are set to 0, in float64."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if name == "sgd":
            return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)

    plain = small(torch.float64)
    model = copy.deepcopy(plain)
    mk.pruning.prune_model_(model, "random", density=0.2)
    kept = masks(model)
    for layer, mask in kept.items():
        weight = plain.get_submodule(layer).weight
        with torch.no_grad():
            weight.masked_fill_(~mask, 0)
        weight.register_hook(lambda grad, mask=mask: grad * mask)
    start = copy.deepcopy(model.state_dict())
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
    steppers = [(m, optimizer(m)) for m in (plain, model)]
    for _ in range(4):
        for m, stepper in steppers:
            stepper.zero_grad()
            F.cross_entropy(m(x), y).backward()
            stepper.step()
    for layer, mask in kept.items():
        weight, grad = model.get_submodule(layer).weight, model.get_submodule(layer).weight.grad
        assert not weight[~mask].any() and not grad[~mask].any()
        assert (weight[mask] != start[f"{layer}.weight"][mask]).all()
        torch.testing.assert_close(weight, plain.get_submodule(layer).weight)


def test_a_dropped_weight_does_not_count(backend: str) -> None:
    """Not even one that something else wrote: a checkpoint, an optimizer of its own."""
    mask = mk.PackedMask.from_bool(torch.rand(7, 40) < 0.2)
    layer = mk.nn.PrunedLinear(40, 7, mask=mask)
    assert not layer.weight[~mask.unpack()].any()
    x = torch.randn(3, 40)
    with mk.use_backend(backend):
        expected = layer(x)
        with torch.no_grad():
            layer.weight[~mask.unpack()] = math.inf
        y = layer(x)
        assert torch.equal(y, expected)
        y.sum().backward()
    assert not layer.weight.grad[~mask.unpack()].any()
    assert layer.to_plain().weight.isfinite().all()


@pytest.mark.parametrize("method", ("random", "magnitude"))
def test_all_forms_predict_the_same(method: str, tmp_path: Path) -> None:
    model = small()
    mk.pruning.prune_model_(model, method, density=0.1)
    x = torch.randn(2, 1, 8, 8)
    model(x).sum().backward()
    expected = model.eval()(x)
    mk.save_masked(model, tmp_path / "model.mk")
    packed, plain, target = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    mk.pack_model_(packed)
    mk.materialize_(plain)
    for other in (
        packed,
        plain,
        mk.load_masked(tmp_path / "model.mk"),
        mk.load_masked(tmp_path / "model.mk", into=small()),
        mk.load_masked(tmp_path / "model.mk", into=target),
    ):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)
        assert pruned_layers(other) == {}
    layers = [m for m in packed.modules() if isinstance(m, mk.nn.PackedLinear | mk.nn.PackedConv2d)]
    assert not any(layer.weight.requires_grad for layer in layers)
    assert masks(model).keys() == set(LAYERS)
    for layer in pruned_layers(model).values():
        assert layer.weight.requires_grad


def test_state_and_copies_keep_the_mask() -> None:
    model, other = small(), small()
    mk.pruning.prune_model_(model, "random", density=0.3, seed=1)
    mk.pruning.prune_model_(other, "random", density=0.3, seed=2)
    other.load_state_dict(model.state_dict())
    for name, mask in masks(model).items():
        assert torch.equal(masks(other)[name], mask)
        assert torch.equal(masks(copy.deepcopy(model).to(torch.bfloat16))[name], mask)


def test_parameters_stay_what_they_were() -> None:
    """An optimizer made before pruning goes on training the same parameters."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding_mode="reflect", padding=1))
    model.train(False)
    before = list(model.parameters())
    mk.pruning.prune_model_(model, "magnitude", density=0.5)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert not model[0].training
    assert "stride=(2, 2)" in repr(model) and "kept=54 of 108" in repr(model)


def test_what_is_skipped_and_a_method_of_ones_own() -> None:
    def last(model: nn.Module, layers: mk.pruning.Layers, seed: int) -> dict[str, Tensor]:
        return {
            name: torch.arange(layer.weight.numel() * 1.0).view(layer.weight.shape)
            for name, layer in layers.items()
        }

    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2), nn.Linear(3, 3))
    report = mk.pruning.prune_model_(
        model, last, density=0.25, filter_fn=lambda name, _: name != "2"
    )
    assert set(report.converted) == {"0"} and set(report.skipped) == {"1", "2"}
    assert model[0].mask.unpack().flatten().nonzero().flatten().tolist() == [9, 10, 11]


def test_modules_are_drop_ins() -> None:
    mask = mk.PackedMask.from_bool(torch.rand(6, 2, 3, 3) < 0.5)
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 1}
    layer, plain = mk.nn.PrunedConv2d(**arguments, mask=mask), nn.Conv2d(**arguments)
    with torch.no_grad():
        plain.bias.copy_(layer.bias)
        plain.weight.copy_(layer.weight)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))
    bound = 1 / math.sqrt(18)
    for parameter in (layer.weight, layer.bias):
        assert parameter.requires_grad and 0 < parameter.abs().max() <= bound
    weight = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, weight) and not layer.weight[~mask.unpack()].any()
    meta = mk.nn.PrunedLinear(
        8, 4, device="meta", mask=mk.PackedMask.from_bool(torch.ones(4, 8) > 0)
    )
    assert meta(torch.empty(2, 8, device="meta")).shape == (2, 4)
    again = prune_layer(plain, mask)
    assert again.weight is plain.weight and again.bias is plain.bias


def test_density_at_saving() -> None:
    """Both readings of "90 %": of storage, under three units a kept weight, and of weights."""
    assert mk.pruning.SAVINGS == (0.90, 0.92, 0.94, 0.96)
    by_storage = [mk.pruning.density_at_saving(s) for s in mk.pruning.SAVINGS]
    assert by_storage == pytest.approx([0.1 / 3, 0.08 / 3, 0.02, 0.04 / 3])
    assert 1 - by_storage[0] == pytest.approx(0.967, abs=5e-4)
    by_rate = [mk.pruning.density_at_saving(s, index_cost=0) for s in mk.pruning.SAVINGS]
    assert by_rate == pytest.approx([0.10, 0.08, 0.06, 0.04])
    p = 462_000
    for saving, density in zip(mk.pruning.SAVINGS, by_storage, strict=True):
        assert p * density + 2 * p * density == pytest.approx((1 - saving) * p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "minimum", "density": 0.1}, "method: got 'minimum', expected one of random"),
        ({"density": 1.5}, "density: got 1.5"),
        ({"density": 0.1, "scope": "network"}, "scope: got 'network', expected one of layer"),
    ],
    ids=str,
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=message):
        mk.pruning.prune_model_(model, **arguments)
    assert type(model[0]) is nn.Linear


def test_scores_that_do_not_fit_leave_the_model_untouched() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = [p.clone() for p in model.parameters()]
    for scores, message in (
        ({"0": torch.ones(3, 3)}, r"method: got scores of \['0'\], expected those of \['0', '1'\]"),
        ({"0": torch.ones(3, 3), "1": torch.ones(3, 2)}, r"scores of '1': got shape \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.pruning.prune_model_(model, lambda *_, scores=scores: scores, density=0.5)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="model: got a bare Linear"):
        mk.pruning.prune_model_(nn.Linear(3, 3), density=0.5)
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        mk.pruning.prune_model_(model, "magnitude", density=0.5)
    with pytest.raises(ValueError, match=r"saving: got 90"):
        mk.pruning.density_at_saving(90)
    with pytest.raises(ValueError, match=r"index_cost: got -1"):
        mk.pruning.density_at_saving(0.9, -1)
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 7\), expected \(4, 8\)"):
        mk.nn.PrunedLinear(8, 4, mask=mk.PackedMask.from_bool(torch.ones(4, 7).bool()))
