"""masked_conv2d_fused against float64, and packed models that run it."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Conv, assert_within, dense, make_mask, make_weight
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.nn import packed_sequential
from masked_kernels.nn._watch import Watch

ACTIVATIONS = {"identity": lambda y: y, "gelu": F.gelu, "relu": F.relu}


def depthwise(channels: int, kernel: int = 5, **fields: object) -> Conv:
    fields = {"padding": kernel // 2, **fields}
    return Conv(
        channels=channels, outputs=channels, groups=channels, kernel=(kernel, kernel), **fields
    )


CASES = (
    *(depthwise(channels) for channels in (1, 15, 16, 17, 33)),
    *(depthwise(17, kernel, size=(9, 13)) for kernel in (1, 3, 4, 7, 9, 11)),
    *(depthwise(16, size=size) for size in ((1, 1), (2, 3), (4, 4), (40, 37))),
    depthwise(16, padding=0),
    depthwise(16, padding=(4, 1), batch=1),
    depthwise(16, batch=0),
    depthwise(16, stride=2),
    depthwise(16, dilation=2, padding=4),
    Conv(channels=8, outputs=8, groups=8, kernel=(3, 5), padding=(1, 2)),
    *(Conv(channels=32, outputs=n, kernel=(1, 1), size=(9, 8)) for n in (1, 16, 33, 96)),
    Conv(channels=64, outputs=256, kernel=(1, 1), size=(9, 8)),
    Conv(channels=33, outputs=31, kernel=(1, 1)),
    Conv(channels=33, outputs=31, kernel=(1, 1), batch=0),
    Conv(channels=3, outputs=16, kernel=(2, 2), stride=2),
    Conv(batch=0),
    Conv(groups=2, padding=1),
)


def as_pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def check(
    case: Conv,
    period: str,
    activation: str,
    dtype: torch.dtype,
    backend: str,
    with_residual: tuple[bool, ...] = (False, True),
) -> None:
    weight = make_weight(period, case.weight_shape, dtype)
    values = weight.values if isinstance(weight, mk.Prototype) else weight
    mask = make_mask("random", case.weight_shape)
    masked = torch.where(mask, dense(weight, case.weight_shape), 0)
    affine = torch.randn(4, case.outputs).to(dtype)
    image = torch.randn(case.batch, case.channels, *case.size).to(dtype)

    def plain(dtype: torch.dtype, residual: Tensor | None) -> Tensor:
        rows = affine.to(dtype).view(4, -1, 1, 1)
        y = F.conv2d(image.to(dtype), masked.to(dtype), **case.geometry)  # type: ignore[arg-type]
        y = ACTIVATIONS[activation](y * rows[0] + rows[1]) * rows[2] + rows[3]
        return y if residual is None else y + residual.to(dtype)

    geometry = [as_pair(value) for value in (case.stride, case.padding, case.dilation)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for residual in (
            torch.randn_like(plain(dtype, None)) if r else None for r in with_residual
        ):
            got = _ops.masked_conv2d_fused(
                image.contiguous(memory_format=memory_format),
                values,
                mk.PackedMask.from_bool(mask).words,
                affine,
                activation,
                residual,
                list(case.kernel),
                *geometry,
                case.groups,
                backend,
            )
            assert not got.numel() or got.is_contiguous(memory_format=torch.channels_last)
            assert_within("y", got, plain(dtype, residual), plain(torch.float64, residual))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("period", ("dense", "7", "K", "2K", "NK+5"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_conv2d_fused(
    case: Conv, period: str, activation: str, with_residual: bool, backend: str
) -> None:
    check(case, period, activation, torch.float32, backend, (with_residual,))


def test_other_dtypes_are_the_references() -> None:
    check(CASES[0], "K", "gelu", torch.bfloat16, "reference")
    with pytest.raises(mk.BackendError, match="computes in float32"):
        check(CASES[0], "K", "gelu", torch.bfloat16, "cpu")


def test_gelu_far_from_zero(backend: str) -> None:
    """An identity convolution shows the GELU itself: large, tiny and special inputs."""
    words = mk.PackedMask.from_bool(torch.ones(1, 1, 1, 1, dtype=torch.bool)).words
    one = torch.tensor([[1.0], [0.0], [1.0], [0.0]])

    def gelu(x: Tensor) -> Tensor:
        point = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
        return _ops.masked_conv2d_fused(
            x.view(1, 1, 1, -1), torch.ones(1), words, one, "gelu", None, *point, backend
        ).flatten()

    x = torch.tensor([0.0, -0.0, 1e-30, -1e-6, 1e-3, -0.7, 5.4, -5.4, -6, 30, -1e3, 1e30])
    error = (gelu(x).double() - F.gelu(x.double())).abs()
    assert (error <= torch.finfo(x.dtype).eps * x.abs().clamp_max(8).maximum(x)).all()
    assert gelu(torch.tensor([torch.nan])).isnan().all()


def trained(align: bool = True, dim: int = 32) -> nn.Module:
    """A masked ConvMixer whose norms have seen data, in evaluation mode."""
    model = mk.models.create_model("convmixer", dim=dim, depth=2)
    mk.mask_model_(model, mk.recipes.random_padding(3e-2, align=align))
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that run from now on, in order; the same product again does not show."""
    calls: list[str] = []

    def record(module: object, name: str) -> None:
        original = getattr(module, name)

        def recording(op: str, *args: object) -> object:
            calls.append(op)
            return original(op, *args)

        monkeypatch.setattr(module, name, recording)

    record(_ops, "select")
    record(packed_sequential, "bind")
    return calls


@pytest.mark.parametrize("side", (16, 32))  # of 32, rows are whole vectors of AVX-512
@pytest.mark.parametrize("align", (False, True))
def test_packed_model(
    align: bool, side: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = trained(align), torch.randn(4, 3, side, side)
    truth = copy.deepcopy(model)
    mk.materialize_(truth)
    packed = copy.deepcopy(model)
    mk.pack_model_(packed)
    expected = model(x)
    with mk.use_backend(backend), torch.inference_mode():
        calls = fused_calls(monkeypatch)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            calls.clear()
            form = copy.deepcopy(packed)  # has no call behind it that this one might be like
            assert_within("logits", form(image), expected, truth.double()(image.double()))
            assert calls[:2] == ["masked_conv2d_chain"] * 2
            assert calls[2:] in ([], ["masked_linear"])
            assert packed.stem(image).is_contiguous(memory_format=torch.channels_last)
    again = copy.deepcopy(packed)
    mk.materialize_(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in truth.modules()]
    assert again.state_dict().keys() == truth.state_dict().keys()


@pytest.mark.parametrize("name", ("resnet20", "resnet18", "resnet50"))
def test_packed_resnets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution runs together with its BatchNorm and, but for a block's last, its ReLU."""
    model = mk.models.create_model(name, width=8, depths=[1, 1]).eval()
    mk.mask_model_(model, mk.recipes.random_padding(3e-2))
    convolutions = len(mk.pack_model_(model).converted) - 1
    calls = fused_calls(monkeypatch)
    with torch.inference_mode():
        model(torch.randn(2, 3, 16, 16))
    monkeypatch.undo()
    assert set(calls) <= {"masked_conv2d_fused", "masked_conv2d_chain", "masked_linear"}
    fused = [m for m in model.modules() if isinstance(m, mk.nn.PackedSequential)]
    inside = [m for each in fused for m in each if isinstance(m, mk.nn.PackedConv2d)]
    assert len(inside) == convolutions


def test_the_orders_that_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm() -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(4)
        with torch.no_grad():
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
        return norm

    def run(*rest: nn.Module, residual: bool = False, **conv: object) -> list[str]:
        """The ops of a packed sequence, which must compute what the masked one does."""
        kind = mk.nn.Residual if residual else nn.Sequential
        layer = nn.Conv2d(4, 4, 3, padding=1, **conv)
        model = nn.ModuleDict({"a": kind(layer, *rest)}).eval()
        mk.mask_model_(model, mk.MaskConfig(rule=mk.Threshold(0.0, rescale=True)))
        x = torch.randn(2, 4, 5, 5)
        expected = model["a"](x)
        truth = copy.deepcopy(model)
        mk.materialize_(truth)
        mk.pack_model_(model)
        calls = fused_calls(monkeypatch)
        with torch.no_grad():
            got = model["a"](x)
        monkeypatch.undo()
        assert_within("y", got, expected, truth["a"].double()(x.double()))
        return calls

    fused, alone = ["masked_conv2d_chain"], ["masked_conv2d"]
    assert run(nn.ReLU(), norm(), nn.GELU()) == ["masked_conv2d_fused"]  # and GELU after it
    for rest in (
        (nn.GELU(), norm()),
        (norm(), nn.ReLU()),
        (norm(), nn.GELU(), norm()),
        (norm(),),
        (nn.ReLU(),),
        (norm(), norm()),
    ):
        for residual in (False, True):
            assert run(*rest, residual=residual) == fused, rest
            assert run(*rest, residual=residual, groups=4, bias=False) == fused, rest
    for rest in (
        (),
        (nn.GELU("tanh"),),
        (nn.SiLU(), norm()),
        (nn.BatchNorm2d(4, track_running_stats=False),),
    ):
        assert run(*rest) == alone, rest
    assert run(nn.ReLU(), padding_mode="reflect") == alone


def test_a_large_batch_runs_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step is the library's: 16 outputs of a large image, whose values do not align."""
    if reason := mk.backends()["cpu"]:
        pytest.skip(f"backend 'cpu' is unavailable: {reason}")
    from masked_kernels.backends.cpu import conv2d_chain

    model, x = trained(align=False, dim=16), torch.randn(5, 3, 64, 64)
    truth = copy.deepcopy(model)
    mk.materialize_(truth)
    expected = model(x)
    mk.pack_model_(model)
    monkeypatch.setattr(conv2d_chain, "_SLICE_BYTES", 1)  # an image a slice
    parts: list[int] = []
    fused_ = conv2d_chain.fused_

    def recording(y: Tensor, *args: object) -> None:
        parts.append(len(y))
        fused_(y, *args)

    monkeypatch.setattr(conv2d_chain, "fused_", recording)
    with torch.no_grad(), mk.use_backend("cpu"):
        assert_within("logits", model(x), expected, truth.double()(x.double()))
        assert set(parts) == {1}
        assert model(x[:0]).shape == (0, 10)


def test_a_change_inside_counts_too() -> None:
    model, x = trained(), torch.randn(2, 3, 16, 16)
    packed = copy.deepcopy(model)
    mk.pack_model_(packed)
    with torch.no_grad():
        packed(x)
        for form in (model, packed):
            form.blocks[1].depthwise[2] = nn.BatchNorm2d(32, eps=0.1).eval()
            form.blocks[0].pointwise[2].eps = 0.5
        torch.testing.assert_close(packed(x), model(x))
        packed.blocks[0].pointwise[2].train()  # statistics of the whole batch: no slices, no fusion
        model.blocks[0].pointwise[2].train()
        torch.testing.assert_close(packed(x), model(x))


def test_what_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained(), torch.randn(4, 3, 16, 16)
    packed = copy.deepcopy(model)
    mk.pack_model_(packed)
    calls = fused_calls(monkeypatch)
    gradients = []
    for form in (model, packed):
        image = x.clone().requires_grad_()
        gradients += torch.autograd.grad(form(image).sum(), image)
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(packed.train()(x), model.train()(x))
        packed.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16
        packed.bfloat16()(x.bfloat16())
    assert "masked_conv2d_fused" not in calls


def test_a_change_counts_at_once() -> None:
    model, x = trained(), torch.randn(4, 3, 16, 16)
    packed = copy.deepcopy(model)
    mk.pack_model_(packed)
    with torch.no_grad():
        for step in range(3):
            torch.testing.assert_close(packed(x), model(x))
            for form in (model, packed):
                norm = form.stem[2]
                if step == 0:
                    norm.running_var.mul_(2)
                else:
                    norm.weight = nn.Parameter(norm.weight + 1)
        for form in (model, packed):
            form.stem[2] = nn.BatchNorm2d(32, eps=0.1).eval()
        torch.testing.assert_close(packed(x), model(x))
        with pytest.raises(ValueError, match="groups: got 1 with 2 channels"):
            packed(x[:, :2])


def test_saving_and_compiling(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, x = trained(), torch.randn(4, 3, 16, 16)
    mk.save_masked(model, tmp_path / "masked.mk")
    mk.pack_model_(model)
    mk.save_masked(model, tmp_path / "packed.mk")
    assert (tmp_path / "masked.mk").read_bytes() == (tmp_path / "packed.mk").read_bytes()
    with torch.no_grad():
        expected = model(x)
        loaded = mk.load_masked(tmp_path / "packed.mk")
        assert torch.equal(loaded(x), expected)
        loaded.stem[2].running_mean.add_(1)
        assert torch.equal(mk.load_masked(tmp_path / "packed.mk", into=loaded)(x), expected)
        torch.save(model, tmp_path / "whole.pt")
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)


def test_watch() -> None:
    class Layer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.part = nn.BatchNorm1d(2)

    layer, norm = Layer(), nn.BatchNorm2d(2)
    watch = Watch([layer, norm])
    assert watch.has_changed()
    changes = (
        lambda: layer.weight.detach().add_(1),
        lambda: setattr(layer.weight, "data", torch.zeros(2, 2)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(2, 2))),
        lambda: setattr(layer, "bias", None),
        lambda: layer.part.running_mean.zero_(),
        lambda: setattr(layer, "part", nn.BatchNorm1d(2)),
        lambda: setattr(norm, "eps", 1.0),
        lambda: norm.eval(),
    )
    for change in changes:
        assert not watch.has_changed()
        change()
        watch.tensors()  # whoever looks first, the change is not lost
        assert watch.has_changed()
    with torch.inference_mode():
        norm.weight = nn.Parameter(torch.ones(2))
    assert watch.has_changed()
    assert watch.has_changed()
