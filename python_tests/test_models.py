"""Every registered model under every recipe; ConvMixer against the paper's counts."""

import re

import pytest
import torch
from torch import nn

import masked_kernels as mk
from masked_kernels.models import spec_of

TINY = {"dim": 16, "depth": 2, "patch_size": 2, "in_channels": 3, "num_classes": 5}


SMALLER = {
    "convmixer": TINY,
    "resnet": {"width": 4, "num_classes": 5},
    "vit": {"dim": 16, "heads": 2, "dim_head": 8, "mlp_dim": 16, "image_size": 8, "num_classes": 5},
}


@pytest.mark.parametrize("name", mk.models.list_models())
def test_forward_backward_and_pack(name: str) -> None:
    family = re.split(r"[_\d]", name)[0]
    arguments = dict(SMALLER[family])
    model = mk.models.create_model(name, **arguments)
    assert spec_of(model) == mk.models.ModelSpec(name, arguments)
    mk.mask_model_(model, mk.recipes.random_padding(1e-2))
    x = torch.randn(2, 3, 8, 8)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )
    model.eval()
    expected = model(x)
    mk.pack_model_(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("name", "maskable", "batch_norm"),
    [
        # stem 12 d, depth * (25 d + d^2), head 10 d; BatchNorm affine 2 d each
        ("convmixer_256_6", 437_248, 6_656),
        ("convmixer_256_8", 581_120, 8_704),
        ("convmixer_512_6", 1_660_928, 13_312),
        ("convmixer_512_8", 2_210_816, 17_408),
    ],
)
def test_convmixer_parameter_counts(name: str, maskable: int, batch_norm: int) -> None:
    model = mk.models.create_model(name)
    counted = {
        kind: sum(p.numel() for m in model.modules() if isinstance(m, kind) for p in m.parameters())
        for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    }
    assert counted[nn.Conv2d] + counted[nn.Linear] == maskable
    assert counted[nn.BatchNorm2d] == batch_norm
    assert sum(p.numel() for p in model.parameters()) == maskable + batch_norm


def test_convmixer_structure() -> None:
    """GELU stands before BatchNorm; the residual goes around the depthwise half; no bias."""
    model = mk.models.ConvMixer(**TINY).eval()
    block = model.blocks[0]
    assert [type(m) for m in block.depthwise] == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    x = torch.randn(2, 16, 4, 4)
    depthwise = torch.nn.Sequential(*block.depthwise)
    torch.testing.assert_close(block(x), block.pointwise(x + depthwise(x)))
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_masked_and_dense_training_agree_when_nothing_is_masked() -> None:
    """At density 1 a masked network is its dense twin: score gradient = weight gradient ⊙ w."""
    torch.manual_seed(0)
    dense = mk.models.ConvMixer(**TINY)
    masked = mk.models.ConvMixer(**TINY)
    masked.load_state_dict(dense.state_dict())
    mk.mask_model_(masked, mk.MaskConfig(rule=mk.TopK(1.0), values="pretrained"))
    x = torch.randn(4, 3, 8, 8)
    for model in (dense, masked):
        model(x).logsumexp(1).sum().backward()
    pairs = zip(dense.modules(), masked.modules(), strict=True)
    for plain, layer in ((p, m) for p, m in pairs if isinstance(p, nn.Conv2d | nn.Linear)):
        expected = plain.weight.grad * plain.weight * layer.scores.sign()
        torch.testing.assert_close(layer.scores.grad, expected, rtol=1e-3, atol=1e-5)


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="name: got 'convnext', expected one of convmixer"):
        mk.models.create_model("convnext")
    assert spec_of(nn.Linear(1, 1)) is None
