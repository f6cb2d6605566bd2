"""mask_model_ on modules it has never seen: what it leaves alone, and that the rest is right."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import masked_kernels as mk

DENSE, PROTOTYPE = mk.recipes.edge_popup(), mk.recipes.random_padding(1e-1)
both = pytest.mark.parametrize("config", (DENSE, PROTOTYPE), ids=("dense", "prototype"))


def skipped(model: nn.Module, config: mk.MaskConfig = DENSE) -> dict[str, str]:
    return mk.mask_model_(model, config).skipped


def reason(layer: nn.Module, config: mk.MaskConfig = DENSE) -> str | None:
    """Why a layer inside of a model is skipped, None if it is masked."""
    return skipped(nn.ModuleDict({"layer": layer}), config).get("layer")


def check_forms(model: nn.Module, *inputs: object, **options: object) -> None:
    """Masked, packed and plain form agree where a fused inference might read a raw weight."""
    model.eval()
    plain, packed = copy.deepcopy(model), copy.deepcopy(model)
    mk.materialize_(plain)
    mk.pack_model_(packed)
    truth = copy.deepcopy(plain).double()
    # The device that conftest.py sets is a mode, under which torch's fused encoder would not run.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        wide = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
        ]
        expected, exact = plain(*inputs, **options), truth(*wide, **options)
        assert_within("masked", model(*inputs, **options), expected, exact)
        assert_within("packed", packed(*inputs, **options), expected, exact)


class Unusual(nn.Module):
    """Tied weights, one module under two names, attention that reads its weights, a lazy layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.tied = nn.Linear(8, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.lazy = nn.LazyLinear(3)
        self.excluded = nn.Linear(8, 8)
        self.norm = nn.LayerNorm((8, 8))
        self.whole = nn.Linear(8, 8)
        self.whole.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x, _ = self.attention(x, x, x)
        return self.tied(self.second(self.first(x)))


def test_what_is_skipped_and_why() -> None:
    model = Unusual()
    seen = []

    def keep(name: str, module: nn.Module) -> bool:
        seen.append(name)
        return not isinstance(module, nn.Linear) or name != "excluded"

    report = mk.mask_model_(model, DENSE, filter_fn=keep)
    assert seen == ["first", "excluded"], "filter_fn is asked about layers that can be masked"
    assert set(report.converted) == {"first"}
    assert report.skipped == {
        "embedding": "Embedding has no masked form",
        "tied": "its weight is also embedding.weight",
        "attention": "MultiheadAttention has no masked form",
        "attention.out_proj": "MultiheadAttention.forward reads its weight",
        "lazy": "LazyLinear has no weight before its first call",
        "excluded": "filter_fn returned False",
        "norm": "LayerNorm has no masked form",
        "whole": "its weight is torch.int8",
    }
    text = str(report)
    assert "converted 1, skipped 8" in text
    assert "excluded: skipped, filter_fn returned False" in text


@both
def test_shared_modules_are_converted_once(config: mk.MaskConfig) -> None:
    model = Unusual()
    mk.mask_model_(model, config)
    assert isinstance(model.first, mk.nn.MaskedLinear) and model.second is model.first
    check_forms(model, torch.arange(6))
    model(torch.arange(6)).sum().backward()
    assert model.first.scores.grad.any()
    assert len(mk.pack_model_(model).converted) == 2
    assert isinstance(model.second, mk.nn.PackedLinear) and model.second is model.first


def test_ties_survive(tmp_path: Path) -> None:
    model = Unusual()
    del model.lazy
    mk.mask_model_(model, PROTOTYPE)
    assert model.tied.weight is model.embedding.weight
    mk.save_masked(model, tmp_path / "model.mk")
    other = Unusual()
    del other.lazy
    mk.load_masked(tmp_path / "model.mk", into=other)
    assert other.tied.weight is other.embedding.weight
    model.eval()
    assert torch.equal(other(torch.arange(6)), model(torch.arange(6)))


def test_ties_of_every_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
            self.decoder.weight = nn.Parameter(self.encoder.weight.t())  # two objects, one memory
            self.lasting = nn.Linear(4, 4)
            self.extra = self.lasting.weight
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
            self.right.bias = self.left.bias
            self.free = nn.Linear(4, 4)

    assert skipped(Model()) == {
        "encoder": "its weight is also decoder.weight",
        "decoder": "its weight is also encoder.weight",
        "lasting": "its weight is also extra",
        "left": "its bias is also right.bias",
        "right": "its bias is also left.bias",
    }
    with torch.device("meta"):
        assert "free" not in skipped(Model())


class Reader(nn.Module):
    """Reads weights past their layers, in a method, and one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.direct, self.used, self.asked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.used.weight.data = self.used.weight * 2
        self.typed, self.unread = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever a docstring says of self.unread.weight."""
        if isinstance(self.typed.weight, Tensor):
            x = x + F.linear(x, self.direct.weight)
        x = self.typed(self.asked(x.to(self.asked.weight.dtype)))
        return self.unread(x) + self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return self.used(x) @ self.inner.deep.weight.t()

    def elsewhere(self) -> Tensor:
        return self.used.weight


@both
def test_layers_whose_weight_is_read(config: mk.MaskConfig) -> None:
    model = Reader()
    expected = {
        "direct": "Reader.forward reads its weight",
        "inner.deep": "Reader.forward reads its weight",
    }
    if config is PROTOTYPE:
        asks = "Reader.forward asks what its weight is, and a layer of a prototype has none"
        expected |= {"asked": asks, "typed": asks}
    assert skipped(model, config) == expected
    check_forms(model, torch.randn(3, 4))


def test_classes_without_source() -> None:
    made: dict[str, type[nn.Module]] = {}
    code = "class Made(nn.Module):\n    def forward(self, x): return self.layer(x)"
    exec(code, {"nn": nn}, made)
    model = made["Made"]()
    model.layer = nn.Linear(2, 2)
    assert skipped(model) == {}


@both
@pytest.mark.parametrize("norm_first", (False, True))
def test_torch_encoder(norm_first: bool, config: mk.MaskConfig) -> None:
    """Its fused inference, which reads the weights of its layers, must not run."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    converted = mk.mask_model_(model, config).converted
    assert set(converted) == {f"0.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[5], [3]])
    check_forms(model, x)
    check_forms(model[0], x, src_key_padding_mask=padding)


def test_loading_into_a_torch_encoder(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    other = copy.deepcopy(model)
    mk.mask_model_(model, DENSE)
    mk.save_masked(model, tmp_path / "model.mk")
    mk.load_masked(tmp_path / "model.mk", into=other)
    mk.materialize_(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), torch._C.DisableTorchFunction():
        torch.testing.assert_close(other(x), model(x))


def test_computed_parameters() -> None:
    biased = nn.Linear(4, 4)
    parametrize.register_parametrization(biased, "bias", nn.Tanh())
    for layer, parameter in (
        (parametrizations.weight_norm(nn.Linear(4, 4)), "weight"),
        (parametrizations.orthogonal(nn.Linear(4, 4)), "weight"),
        (prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5), "weight"),
        (prune.l1_unstructured(nn.Conv2d(4, 4, 1), "bias", 0.5), "bias"),
        (biased, "bias"),
    ):
        assert reason(layer) == f"its {parameter} is computed from other parameters"


class Named(nn.Linear):
    """A subclass that computes what its parent does."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_subclasses(tmp_path: Path) -> None:
    assert reason(Doubled(4, 4)) == "Doubled has a forward of its own"
    assert reason(Standardised(4, 4, 1)) == "Standardised has a forward of its own"
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert reason(patched) == "torch.nn.modules.linear.Linear has a forward of its own"
    model = nn.Sequential(Named(4, 4))
    plain = copy.deepcopy(model)
    assert skipped(model) == {}
    check_forms(model, torch.randn(2, 4))
    mk.save_masked(model, tmp_path / "model.mk")
    mk.load_masked(tmp_path / "model.mk", into=plain)
    x = torch.randn(2, 4)
    assert torch.equal(plain(x), model(x))


def test_hooks() -> None:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    assert reason(layer) == "it has hooks, which a new layer would not have"


class Quantised(Tensor):
    """As of a library that puts its own tensors into ``nn.Linear``."""


class Packed(nn.Module):
    """As torch's quantised layers: the weight is no parameter."""

    def weight(self) -> Tensor:
        return torch.zeros(2, 2)


def test_quantised_layers() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    assert reason(layer) == "its weight is a Quantised"
    assert reason(Packed()) == "Packed has no masked form"


def test_lazy_layers_after_their_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.randn(1, 5))
    assert skipped(model) == {}
    check_forms(model, torch.randn(2, 5))


def test_other_kinds_of_layers() -> None:
    for layer in (
        nn.Conv1d(2, 2, 1),
        nn.ConvTranspose2d(2, 2, 1),
        nn.LSTM(2, 2),
        nn.Bilinear(2, 2, 2),
    ):
        assert reason(layer) == f"{type(layer).__name__} has no masked form"
    for layer in (nn.BatchNorm2d(2), nn.PReLU(), nn.Identity(), nn.CrossEntropyLoss(torch.ones(2))):
        assert reason(layer) is None
