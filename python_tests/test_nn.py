"""Masked and packed layers: drop-in constructors, gradients, state, representation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import masked_kernels as mk

GEOMETRIES = [
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3},
    {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 1), "stride": 2, "padding": (1, 2)},
    {
        "in_channels": 4,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": "same",
        "groups": 4,
        "bias": False,
    },
    {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "circular",
    },
    {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 2,
        "padding": "same",
        "padding_mode": "reflect",
        "dilation": 3,
    },
    {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "dtype": torch.float64},
]


def twin(layer: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain layer with the masked layer's effective weight."""
    with torch.no_grad():
        plain.weight.copy_(torch.where(layer.mask.unpack(), layer.weight, 0))
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_conv2d_is_a_drop_in(arguments: dict[str, object], backend: str) -> None:
    if backend in ("cpu", "triton") and arguments.get("dtype") == torch.float64:
        pytest.skip("backend 'cpu' selects float32 and 16-bit scores only")
    layer = mk.nn.MaskedConv2d(**arguments)
    plain = twin(layer, nn.Conv2d(**arguments))
    x = torch.randn(2, 4, 9, 8, dtype=layer.scores.dtype)
    with mk.use_backend(backend):
        torch.testing.assert_close(layer(x), plain(x))
        packed = mk.nn.packed.pack_layer(layer)
        torch.testing.assert_close(packed(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(packed.to_plain()(x), plain(x))
    assert packed.geometry == layer.geometry
    assert layer.weight_shape == tuple(plain.weight.shape)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_a_drop_in(bias: bool, backend: str) -> None:
    layer = mk.nn.MaskedLinear(33, 5, bias)
    plain = twin(layer, nn.Linear(33, 5, bias))
    x = torch.randn(2, 3, 33)
    with mk.use_backend(backend):
        torch.testing.assert_close(layer(x), plain(x))
        packed = mk.nn.packed.pack_layer(layer)
        assert torch.equal(packed(x), layer(x))


def test_what_trains() -> None:
    layer = mk.nn.MaskedLinear(8, 4)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["scores", "bias"]
    before = layer.weight.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(torch.randn(16, 8)).pow(2).sum().backward()
    assert layer.weight.grad is None
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_training_lowers_the_loss() -> None:
    """Learning a teacher that is itself a mask of the same weights."""
    torch.manual_seed(3)
    layer = mk.nn.MaskedLinear(32, 16, bias=False)
    teacher = torch.where(mk.TopK(0.5)(torch.randn(16, 32)).unpack(), layer.weight, 0)
    x = torch.randn(512, 32)
    optimizer = torch.optim.SGD([layer.scores], lr=0.05)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(layer(x), F.linear(x, teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_values_are_not_copied() -> None:
    weight, prototype = torch.randn(4, 8), mk.Prototype(torch.randn(3))
    assert mk.nn.MaskedLinear(8, 4, weight=weight).weight.data_ptr() == weight.data_ptr()
    first, second = (mk.nn.MaskedLinear(8, 4, weight=prototype) for _ in range(2))
    assert first.prototype is second.prototype is prototype
    assert first.weight is None
    parameter = nn.Parameter(weight)
    assert mk.nn.MaskedLinear(8, 4, weight=parameter).weight is parameter


def test_state_dict_round_trip() -> None:
    for make in (
        lambda: mk.nn.MaskedConv2d(4, 6, 3),
        lambda: mk.nn.MaskedLinear(8, 4, weight=mk.Prototype(torch.randn(3))),
        lambda: mk.nn.packed.pack_layer(mk.nn.MaskedLinear(8, 4, rule=mk.Threshold(rescale=True))),
    ):
        source, target = make(), make()
        target.load_state_dict(source.state_dict())
        assert target.mask == source.mask
        assert torch.equal(target.dense_weight(), source.dense_weight())


def test_dtype_moves_leave_the_bits() -> None:
    packed = mk.nn.packed.pack_layer(mk.nn.MaskedLinear(40, 8))
    mask = packed.mask
    packed.to(torch.bfloat16)
    assert packed.mask == mask
    assert packed(torch.randn(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rescale_is_frozen_into_the_packed_layer() -> None:
    layer = mk.nn.MaskedLinear(40, 8, rule=mk.Threshold(0.05, rescale=True))
    x = torch.randn(3, 40)
    packed = mk.nn.packed.pack_layer(layer)
    torch.testing.assert_close(packed.weight_scale, torch.tensor(layer.mask.density() ** -0.5))
    assert torch.equal(packed(x), layer(x))
    torch.testing.assert_close(packed.to_plain()(x), layer(x))


def test_deepcopy_and_repr() -> None:
    layer = mk.nn.MaskedConv2d(4, 6, 3, padding=1, groups=2, weight=mk.Prototype(torch.randn(5)))
    copied = copy.deepcopy(layer)
    assert copied.prototype is not layer.prototype
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(copied(x), layer(x))
    text = repr(layer)
    for part in ("4, 6", "padding=(1, 1)", "groups=2", "TopK(density=0.5", "weight=prototype of 5"):
        assert part in text


def test_meta_device() -> None:
    layer = mk.nn.MaskedConv2d(4, 6, 3, device="meta")
    assert layer(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 6, 3, 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"weight: got shape \(4, 7\), expected \(4, 8\)"):
        mk.nn.MaskedLinear(8, 4, weight=torch.randn(4, 7))
    mask = mk.PackedMask.from_bool(torch.ones(4, 7).bool())
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 7\), expected \(4, 8\)"):
        mk.nn.PackedLinear(8, 4, weight=torch.randn(4, 8), mask=mask)


@pytest.mark.parametrize("recipe", ["edge_popup", "max_layer_padding"])
def test_memory_format_is_for_images(recipe: str) -> None:
    """Scores and frozen weights stay row-major, in which they are ranked and read."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 2, 3, bias=False)))
    mk.mask_model_(model[1], getattr(mk.recipes, recipe)())
    x = torch.randn(2, 3, 7, 7)
    before = model(x)
    model.to(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous() for p in model[1].parameters())
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), before)
