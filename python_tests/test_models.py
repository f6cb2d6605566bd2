"""The models' sizes against the literature's, and their structure against torch's own modules."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within
from torch import nn

import masked_kernels as mk
from masked_kernels.models import spec_of

TINY = {"dim": 16, "depth": 2, "patch_size": 2, "in_channels": 3, "num_classes": 5}
RATIOS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def without_memory(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return mk.models.create_model(name, **arguments)


def numel(model: nn.Module, *kinds: type[nn.Module]) -> int:
    """Parameters of the modules of these kinds."""
    return sum(p.numel() for m in model.modules() if isinstance(m, kinds) for p in m.parameters())


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
    model = without_memory(name)
    assert numel(model, nn.Conv2d, nn.Linear) == maskable
    assert numel(model, nn.BatchNorm2d) == batch_norm
    assert sum(p.numel() for p in model.parameters()) == maskable + batch_norm


@pytest.mark.parametrize("dim", (256, 512))
@pytest.mark.parametrize("depth", (6, 8))
def test_vit_parameter_counts(dim: int, depth: int) -> None:
    model = without_memory(f"vit_{dim}_{depth}")
    maskable = 48 * dim + depth * (4 * 512 * dim + 2 * 512 * dim) + 10 * dim
    biases = dim + depth * (dim + 512 + dim) + 10
    norms = (2 * depth + 1) * 2 * dim
    tokens = dim + 65 * dim
    assert sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2) == maskable
    assert sum(p.numel() for p in model.parameters()) == maskable + biases + norms + tokens


@pytest.mark.parametrize(
    ("name", "arguments", "published"),
    [
        # He et al., table 6: 0.27 M, 0.46 M, 0.85 M; to the weight, as the reimplementations print.
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet56", {}, 853_018),
        ("resnet18", {}, 11_173_962),
        # torchvision's models of ImageNet.
        ("resnet18", {"stem": "imagenet", "num_classes": 1000}, 11_689_512),
        ("resnet34", {"stem": "imagenet", "num_classes": 1000}, 21_797_672),
        ("resnet50", {}, 25_557_032),
        ("resnet50", {"stem": "cifar", "num_classes": 10}, 23_520_842),
    ],
)
def test_resnet_parameter_counts(name: str, arguments: dict[str, object], published: int) -> None:
    model = without_memory(name, head_bias=True, **arguments)
    assert sum(p.numel() for p in model.parameters()) == published
    model = without_memory(name, norm_affine=False, **arguments)
    assert numel(model, nn.BatchNorm2d) == 0
    assert sum(p.numel() for p in model.parameters()) == numel(model, nn.Conv2d, nn.Linear)


@pytest.mark.parametrize(
    ("name", "largest", "periods"),
    [
        ("convmixer_256_6", 65_536, (65_536, 6_554, 656, 66, 7, 1)),
        ("convmixer_256_8", 65_536, (65_536, 6_554, 656, 66, 7, 1)),
        ("convmixer_512_6", 262_144, (262_144, 26_215, 2_622, 263, 27, 3)),
        ("convmixer_512_8", 262_144, (262_144, 26_215, 2_622, 263, 27, 3)),
        ("resnet32", 36_864, (36_864, 3_687, 369, 37, 4, 1)),
        ("resnet56", 36_864, (36_864, 3_687, 369, 37, 4, 1)),
        ("resnet50", 2_359_296, (2_359_296, 235_930, 23_593, 2_360, 236, 24)),
        ("vit_256_6", 393_216, (393_216, 39_322, 3_933, 394, 40, 4)),
        ("vit_256_8", 393_216, (393_216, 39_322, 3_933, 394, 40, 4)),
        ("vit_512_6", 786_432, (786_432, 78_644, 7_865, 787, 79, 8)),
        ("vit_512_8", 786_432, (786_432, 78_644, 7_865, 787, 79, 8)),
    ],
)
def test_prototype_lengths(name: str, largest: int, periods: tuple[int, ...]) -> None:
    """PEMN's, of each of its models: what the rule says, and what the models get."""
    assert tuple(mk.prototype_period(largest, ratio) for ratio in RATIOS) == periods
    for ratio, period in zip(RATIOS, periods, strict=True):
        model = without_memory(name)
        plain = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        recipe = mk.recipes.random_padding(ratio)
        report = mk.mask_model_(model, dataclasses.replace(recipe, score_init=1.0))
        assert len(report.converted) == len(plain) and report.skipped == {}
        (prototype,) = {m for m in model.modules() if isinstance(m, mk.Prototype)}
        assert prototype.period == period


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("convmixer_256_6", {1e-1: 95.38, 1e-2: 96.73, 1e-3: 96.86}),
        ("convmixer_256_8", {1e-1: 95.75, 1e-2: 96.76, 1e-3: 96.86}),
        ("resnet32", {1.0: 88.89, 1e-1: 96.08, 1e-2: 96.80}),
        ("resnet56", {1.0: 92.53, 1e-1: 96.44, 1e-2: 96.83}),
        ("resnet50", {1e-1: 95.87, 1e-2: 96.77, 1e-3: 96.86}),
    ],
)
def test_maskable_weights_give_the_papers_compression(
    name: str, percent: dict[float, float]
) -> None:
    """Storage saved by a bit a weight and a float32 prototype, as PEMN's figures plot it."""
    model = without_memory(name, num_classes=10)
    sizes = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for ratio, saved in percent.items():
        got = 100 * (1 - 1 / 32 - ratio * max(sizes) / sum(sizes))
        assert round(got, 2) == saved


def test_one_layer_values_of_convmixer() -> None:
    """PEMN section 3.3: one weight for the stem, the depthwise, the pointwise and the head."""
    model = mk.models.create_model("convmixer_256_6")
    mk.mask_model_(model, mk.recipes.one_layer())
    masked = (m for m in model.modules() if isinstance(m, mk.nn.MaskedConv2d | mk.nn.MaskedLinear))
    assert sum(w.numel() for w in {layer.weight for layer in masked}) == 77_568


def test_convmixer_structure() -> None:
    """GELU stands before BatchNorm; the residual goes around the depthwise half; no bias."""
    model = mk.models.ConvMixer(**TINY).eval()
    block = model.blocks[0]
    assert [type(m) for m in block.depthwise] == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    x = torch.randn(2, 16, 4, 4)
    depthwise = torch.nn.Sequential(*block.depthwise)
    torch.testing.assert_close(block(x), block.pointwise(x + depthwise(x)))
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_vit_is_torchs_pre_norm_encoder() -> None:
    """Where all heads together have ``dim`` features, which is what torch's can have."""
    model = mk.models.ViT(
        dim=24, depth=2, heads=3, dim_head=8, mlp_dim=40, image_size=12, dropout=0.3
    ).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    layer = nn.TransformerEncoderLayer(
        24, 3, 40, 0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for block, other in zip(model.blocks, encoder.layers, strict=True):
        norm1, attention, _ = block.attention
        norm2, linear1, _, _, linear2, _ = block.mlp
        nn.init.zeros_(other.self_attn.in_proj_bias)
        with torch.no_grad():
            other.self_attn.in_proj_weight.copy_(attention.qkv.weight)
        for ours, copied in (
            (norm1, other.norm1),
            (attention.out, other.self_attn.out_proj),
            (norm2, other.norm2),
            (linear1, other.linear1),
            (linear2, other.linear2),
        ):
            copied.load_state_dict(ours.state_dict())

    def theirs(x: torch.Tensor) -> torch.Tensor:
        """A patch's embedding is a strided convolution."""
        embedding = model.stem[1]
        kernel = embedding.weight.view(24, 4, 4, 3).permute(0, 3, 1, 2)
        patches = F.conv2d(x, kernel, embedding.bias, stride=4).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.class_token.expand(len(x), 1, -1), patches], 1) + model.position
        return model.head(model.norm(encoder(tokens)[:, 0]))

    x = torch.randn(2, 3, 12, 12)
    got, plain = model(x), theirs(x)
    model.double()
    encoder.double()
    assert_within("logits", got, plain, theirs(x.double()))


def test_vit_drops_only_in_training() -> None:
    model = mk.models.ViT(dim=8, depth=1, heads=1, dim_head=8, mlp_dim=8, image_size=8, dropout=1.0)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x), model(x.roll(4, 3)))  # every token is dropped
    model.eval()
    assert not torch.equal(model(x), model(x.roll(4, 3)))


@pytest.mark.parametrize("shortcut", ("A", "B"))
def test_resnet_structure(shortcut: str) -> None:
    model = mk.models.ResNet(depths=(2, 1), width=4, shortcut=shortcut).eval()
    same, plain, wider = model.blocks
    x = torch.randn(2, 4, 6, 6)
    for block in (same, plain):
        torch.testing.assert_close(block(x), F.relu(block.branch(x) + x))
    passed = wider.shortcut(x)
    assert passed.shape == (2, 8, 3, 3)
    if shortcut == "A":
        assert torch.equal(passed[:, :4], x[:, :, ::2, ::2]) and not passed[:, 4:].any()
        assert not list(wider.shortcut.parameters())
    else:
        conv, norm = wider.shortcut
        assert (conv.kernel_size, conv.stride, type(norm)) == ((1, 1), (2, 2), nn.BatchNorm2d)
    torch.testing.assert_close(wider(x), F.relu(wider.branch(x) + passed))
    assert [type(m) for m in same.branch] == [
        *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
        *(nn.Conv2d, nn.BatchNorm2d),
    ]
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize("name", ("resnet20", "resnet32", "resnet56"))
def test_cifar_resnet_depth(name: str) -> None:
    """The number in a ResNet's name counts its layers with weights; shortcuts A have none."""
    model = without_memory(name)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert f"resnet{len(layers)}" == name


def test_resnet_stems_and_bottlenecks() -> None:
    """torchvision's: a bottleneck's 3x3 convolution has the stride."""
    model = without_memory("resnet50")
    x = torch.randn(1, 3, 224, 224, device="meta")
    assert model.stem(x).shape == (1, 64, 56, 56)
    assert model.blocks(model.stem(x)).shape == (1, 2048, 7, 7)
    convs = [m for m in model.blocks[3].branch if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size[0], m.stride[0]) for m in convs] == [(1, 1), (3, 2), (1, 1)]
    small = without_memory("resnet50", stem="cifar")
    x = torch.randn(1, 3, 32, 32, device="meta")
    assert small.stem(x).shape == (1, 64, 32, 32)
    assert small.blocks(small.stem(x)).shape == (1, 2048, 4, 4)


@pytest.mark.parametrize("name", ("resnet", "vit", "convmixer"))
def test_channels_last_images_stay_so(name: str) -> None:
    model = mk.models.create_model(name).eval().to(memory_format=torch.channels_last)
    images = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, y: images.append(y) if y.dim() == 4 else None)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    images.clear()
    got = model(x.contiguous(memory_format=torch.channels_last))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in images)
    assert len(images) > 10 or name == "vit"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convmixer", "vit", "resnet"])
def test_plain_models_can_be_traced(name: str) -> None:
    """By torch.fx, whose tracer does not know what a tensor is like."""
    model = mk.models.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"), [("convmixer", TINY), ("resnet", {"depths": (1, 1)})]
)
def test_plain_models_can_be_transformed(name: str, arguments: dict[str, object]) -> None:
    """By torch.func: the gradient of each image."""
    model = mk.models.create_model(name, **arguments).eval()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, image[None]).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(grads[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


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


def test_names_are_defaults() -> None:
    """A name sets arguments that the call may set otherwise; the record has the call's alone."""
    model = mk.models.create_model("convmixer_256_6", depth=2, num_classes=3, in_channels=1)
    assert (len(model.blocks), model.head.in_features, model.head.out_features) == (2, 256, 3)
    arguments = {"depth": 2, "num_classes": 3, "in_channels": 1}
    assert spec_of(model) == mk.models.ModelSpec("convmixer_256_6", arguments)


@pytest.mark.parametrize("name", mk.models.list_models())
def test_common_arguments(name: str) -> None:
    model = without_memory(name, num_classes=7, in_channels=2)
    assert model(torch.randn(2, 2, 32, 32, device="meta")).shape == (2, 7)


def test_errors() -> None:
    for name, arguments, message in (
        ("convnext", {}, "name: got 'convnext', expected one of convmixer"),
        ("resnet", {"shortcut": "C"}, "shortcut: got 'C', expected one of A, B"),
        ("resnet", {"stem": "tiny"}, "stem: got 'tiny', expected one of cifar, imagenet"),
        ("resnet", {"block": "wide"}, "block: got 'wide', expected one of basic, bottleneck"),
        ("vit", {"patch_size": 5}, "image_size: got 32, expected a multiple of patch_size=5"),
    ):
        with pytest.raises(ValueError, match=message):
            mk.models.create_model(name, **arguments)
    assert spec_of(nn.Linear(1, 1)) is None
