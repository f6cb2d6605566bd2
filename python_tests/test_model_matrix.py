"""Every kind of model under every recipe: trained, packed, saved, loaded, exported, compiled."""

import copy
from pathlib import Path

import pytest
import torch
from cases import assert_within
from recipe_cases import RECIPES
from torch import Tensor, nn

import masked_kernels as mk

TINY = {
    "convmixer": {"dim": 16, "depth": 1, "kernel_size": 3},
    "vit": {"dim": 16, "depth": 1, "heads": 2, "dim_head": 4, "mlp_dim": 24, "image_size": 8},
    "resnet": {"width": 8, "depths": [1, 1]},
    "resnet18": {"width": 8, "depths": [1, 1], "norm_affine": False},
    "resnet50": {"width": 8, "depths": [1, 1], "num_classes": 10, "head_bias": True},
}
"""A model of each class and kind of block, stem and shortcut."""

every_model = pytest.mark.parametrize("name", TINY)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def masked(name: str, recipe: str) -> nn.Module:
    """A tiny masked model whose norms have seen data, in evaluation mode."""
    model = mk.models.create_model(name, **TINY[name])
    report = mk.mask_model_(model, RECIPES[recipe], seed=1)
    assert report.skipped == {}
    model(images(4))
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def layers(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def masked_layers(model: nn.Module) -> dict[str, nn.Module]:
    return layers(model, mk.nn.MaskedConv2d, mk.nn.MaskedLinear)


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    return layers(model, mk.nn.PackedConv2d, mk.nn.PackedLinear)


def test_the_names_are_of_these_classes() -> None:
    tested = {type(mk.models.create_model(name, **TINY[name])) for name in TINY}
    assert {type(mk.models.create_model(name)) for name in mk.models.list_models()} == tested


@every_recipe
@every_model
def test_scores_train_and_weights_do_not(name: str, recipe: str) -> None:
    model, config = masked(name, recipe).train(), RECIPES[recipe]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    logits = model(images())
    assert logits.shape == (2, 10)
    logits.logsumexp(1).sum().backward()
    for where, layer in masked_layers(model).items():
        assert layer.scores.grad.isfinite().all() and layer.scores.grad.any(), where
        assert layer.weight is None or layer.weight.grad is None
        assert layer.bias is None or layer.bias.requires_grad == config.train_bias
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    norms = layers(model, nn.BatchNorm2d, nn.LayerNorm).values()
    assert all(p.requires_grad == config.train_norm for norm in norms for p in norm.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trainable, lr=0.1).step()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], before) for n, before in frozen.items())


@every_recipe
@every_model
def test_packed_and_plain_forms(name: str, recipe: str) -> None:
    model, x = masked(name, recipe), images()
    expected = model(x)
    plain = copy.deepcopy(model)
    mk.materialize_(plain)
    assert not masked_layers(plain)
    truth = copy.deepcopy(plain).double()(x.double())
    packed = copy.deepcopy(model)
    report = mk.pack_model_(packed)
    assert report.converted.keys() == masked_layers(model).keys() == packed_layers(packed).keys()
    masks = {where: layer.mask for where, layer in masked_layers(model).items()}
    assert masks == {where: layer.mask for where, layer in packed_layers(packed).items()}
    assert_within("masked", expected, plain(x), truth)
    assert_within("packed", packed(x), plain(x), truth)
    with torch.inference_mode():  # convolutions run as one op with what follows
        assert_within("fused", packed(x), plain(x), truth)


@every_recipe
@every_model
def test_saved_and_loaded(name: str, recipe: str, tmp_path: Path) -> None:
    model, x = masked(name, recipe), images()
    masks = {where: layer.mask for where, layer in masked_layers(model).items()}
    report = mk.save_masked(model, tmp_path / "model.mk")
    assert report.weights == sum(mask.shape.numel() for mask in masks.values())
    loaded = mk.load_masked(tmp_path / "model.mk")
    assert masks == {where: layer.mask for where, layer in packed_layers(loaded).items()}
    mk.pack_model_(model)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert mk.models.spec_of(loaded) == mk.models.ModelSpec(name, TINY[name])


def check_export(model: nn.Module) -> None:
    """Exported for any batch, it computes what it computes without."""
    x = images()
    expected = model(x)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), expected)
    more = images(3)
    torch.testing.assert_close(exported(more), model(more))


@every_model
@pytest.mark.parametrize("form", ("plain", "masked", "packed"))
def test_every_model_exports(name: str, form: str) -> None:
    model = masked(name, "random_padding")
    if form == "plain":
        mk.materialize_(model)
    elif form == "packed":
        mk.pack_model_(model)
    check_export(model)


@every_recipe
def test_every_recipe_exports(recipe: str) -> None:
    check_export(masked("vit", recipe))


COMPILED = {"convmixer": "one_layer", "vit": "random_padding", "resnet": "self_masking"}
"""Compiling takes seconds: each class once, under another recipe."""


@pytest.mark.parametrize(("name", "recipe"), COMPILED.items())
def test_compiled_training(name: str, recipe: str) -> None:
    """Gradients of all that trains, through one graph."""
    torch._dynamo.reset()
    model = masked(name, recipe).train()
    for dropout in layers(model, nn.Dropout).values():
        dropout.p = 0.0
    x = images()
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(x).logsumexp(1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", ("vit", "resnet50"))
def test_compiled_packed_models(name: str) -> None:
    torch._dynamo.reset()
    model, x = masked(name, "random_padding"), images()
    mk.pack_model_(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
