"""Kernels of the Triton backend that small problems are not sent to, on small problems, and the
choice between kernels.
"""

import pytest
import torch
from cases import DTYPES, Conv, Linear, assert_within, make_mask
from test_packed_sequential import check as check_fused

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import why_unavailable

if reason := why_unavailable("triton"):
    pytest.skip(f"backend 'triton' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.triton import config, linear_small
from masked_kernels.backends.triton.output import Output
from masked_kernels.backends.triton.row_weight import row_weight

triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)
ALIGNED = (Linear(1, 1, 1), Linear(3, 5, 33), Linear(17, 130, 96), Linear(2, 37, 1088))


@triton_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_aligned_linear(case: Linear, dtype: torch.dtype, backend: str) -> None:
    for period in {1, case.k, max(case.k // 2, 1) if case.k % 2 == 0 else 1}:
        x, values = torch.randn(case.m, case.k).to(dtype), torch.randn(period).to(dtype)
        bias, scale = torch.randn(case.n).to(dtype), torch.tensor(1.7)
        words = _ops.pack(make_mask("random", (case.n, case.k)), "reference")
        got = x.new_empty(case.m, case.n)
        linear_small.aligned_linear(got, x, values, words, Output(bias, scale))
        plain = _ops.masked_linear(x, values, words, bias, scale, "reference")
        exact = (t.double() for t in (x, values))
        truth = _ops.masked_linear(*exact, words, bias.double(), scale, "reference")
        assert_within(f"period {period}", got, plain, truth)


@triton_only
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_aligned_linear_at_the_ends_of_the_range(magnitude: float, backend: str) -> None:
    """Powers of two that make up for the places of the bits neither overflow nor vanish."""
    x = (torch.randn(2, 64) * magnitude).bfloat16()
    x[1] *= 1e-3
    words = _ops.pack(make_mask("all", (3, 64)), "reference")
    got = x.new_empty(2, 3)
    linear_small.aligned_linear(got, x, torch.ones(1).bfloat16(), words, Output())
    torch.testing.assert_close(
        got.double(), x.double().sum(1, keepdim=True).expand(2, 3), rtol=2e-2, atol=0
    )


@triton_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_by_the_library(dtype: torch.dtype, backend: str) -> None:
    compare_linear(Linear(config.many_tokens(dtype), 5, 33), dtype, backend)


@triton_only
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d_by_the_library(
    dtype: torch.dtype, groups: int, memory_format, backend: str, monkeypatch
) -> None:
    """The decoded filters and their gradient in either format, where they are asymmetric."""
    monkeypatch.setattr(config, "conv_plan", lambda *_: "library")
    case = Conv(groups=groups, padding=1, stride=2, kernel=(2, 3))
    compare_conv2d(case, dtype, backend, memory_format)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_in_parts(dtype: torch.dtype, backend: str, monkeypatch) -> None:
    """Parts of unequal length, the last one empty, on kernels whose problems here fill one."""
    monkeypatch.setattr(config, "parts", lambda *_, **__: 3)
    compare_linear(Linear(65, 5, 33), dtype, backend)
    compare_conv2d(Conv(padding=1, size=(9, 9)), dtype, backend)
    compare_conv2d(Conv(channels=3, outputs=6, groups=3, padding=1), dtype, backend)


@triton_only
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_in_parts(memory_format, backend: str, monkeypatch) -> None:
    """Of values far from zero, whose mean moves from part to part; the last part is empty."""
    monkeypatch.setattr(config, "parts", lambda *_, **__: 5)
    tile = config.ImageTile(pixels=16, channels=16, warps=4, stages=2)
    monkeypatch.setattr(config, "image_tile", lambda *_: tile)
    x = 1000 + torch.randn(2, 17, 7, 10)
    x[1] += 5
    x = x.contiguous(memory_format=memory_format)
    plain, truth = (_ops.gelu_stats(t, "reference") for t in (x, x.double()))
    assert_within("stats", _ops.gelu_stats(x, backend), plain, truth)
    grad, stats = torch.randn_like(x), plain
    vectors = None, False, 1e-5
    got = _ops.gelu_batch_norm_grads(grad, x, stats, *vectors, backend)
    plain, truth = (
        _ops.gelu_batch_norm_grads(*tensors, *vectors, "reference")
        for tensors in ((grad, x, stats), (grad.double(), x.double(), stats.double()))
    )
    for name, *results in zip(("grad x", "grad affine"), got, plain, truth, strict=True):
        assert_within(name, *results)


@triton_only
@pytest.mark.parametrize("plan", ["planes", "tiles", "library"])
def test_fused_pointwise(plan: str, backend: str, monkeypatch) -> None:
    """The epilogue after every way to multiply, sums in parts where there are any."""
    monkeypatch.setattr(config, "linear_plan", lambda *_: plan)
    monkeypatch.setattr(config, "parts", lambda *_, **__: 2)
    case = Conv(1, 33, (4, 5), 5, (1, 1))  # 20 tokens: as many as planes have slots for
    check_fused(case, "K", "gelu", torch.float32, backend)


@triton_only
def test_fused_conv2d_by_the_library(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(config, "conv_plan", lambda *_: "library")
    check_fused(Conv(padding=1, stride=2), "7", "relu", torch.float32, backend)


@triton_only
@pytest.mark.parametrize(
    ("channels", "dilation", "stride"), [(65, 1, 1), (3, 1, 2), (3, 1, 3), (3, 2, 1), (3, 2, 2)]
)
def test_depthwise_strips(channels: int, dilation: int, stride: int, backend: str) -> None:
    """Strips that end within a row and past it, windows that reach out of the image."""
    geometry = {"stride": stride, "dilation": dilation, "padding": (0, 3), "groups": channels}
    case = Conv(1, channels, (5, 13), channels, (2, 3), **geometry)
    check_fused(case, "7", "identity", torch.float32, backend)


@triton_only
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Conv(1, 65, (5, 11), 65, (3, 3), padding=1, groups=65),
        Conv(1, 3, (6, 7), 3, (3, 3), padding=(4, 3), groups=3),
        Conv(1, 3, (1, 12), 3, (1, 3), padding=1, groups=3),
        Conv(2, 3, (9, 12), 6, (2, 3), stride=(3, 2), padding=1, dilation=2, groups=3),
        Conv(1, 3, (9, 9), 3, (4, 11), padding="same", groups=3),
    ],
    ids=str,
)
def test_depthwise_gradients(case: Conv, memory_format, backend: str, monkeypatch) -> None:
    """In parts, the kernel's rows too; padding that reaches past the kernel, which turned filters
    have to crop.
    """
    monkeypatch.setattr(config, "parts", lambda *_, **__: 2)
    for dtype in (torch.float32, torch.bfloat16):
        compare_conv2d(case, dtype, backend, memory_format)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["tiles", "library"])
def test_compact_linear(plan: str, dtype: torch.dtype, backend: str, monkeypatch) -> None:
    """In parts, more than one step each, and by the library."""
    monkeypatch.setattr(config, "linear_plan", lambda *_: plan)
    monkeypatch.setattr(config, "parts", lambda *_, **__: 2)
    mask = make_mask("random", (18, 2100))
    words, x = _ops.pack(mask, "reference"), torch.randn(2, 2100).to(dtype)
    kept, bias = torch.randn(int(mask.sum())).to(dtype), torch.randn(18).to(dtype)
    got, plain, truth = (
        _ops.compact_linear(x.to(each), kept.to(each), words, bias.to(each), None, name)
        for name, each in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    assert_within("y", got, plain, truth)


@triton_only
def test_indices_of_64_bits(backend: str, monkeypatch) -> None:
    """As of values that are too many to be had here."""
    assert config.is_wide(1 << 30) and not config.is_wide((1 << 30) - 1)
    monkeypatch.setattr(config, "is_wide", lambda count: True)
    compare_linear(Linear(5, 3, 33), torch.float32, backend)
    compare_conv2d(Conv(padding=1), torch.float32, backend)
    mask = make_mask("random", (3, 33))
    words, x, kept = _ops.pack(mask, "reference"), torch.randn(2, 33), torch.randn(int(mask.sum()))
    got, expected = (
        _ops.compact_linear(x, kept, words, None, None, name) for name in (backend, "reference")
    )
    torch.testing.assert_close(got, expected)


@triton_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [1, 2, 8])
def test_copies_of_values(copies: int, dtype: torch.dtype, backend: str, monkeypatch) -> None:
    """Rows that start anywhere in a vector, of values in one copy, in two and in one a place."""
    monkeypatch.setattr(config, "linear_plan", lambda *_: "tiles")
    monkeypatch.setattr(
        config, "value_copies", lambda period, count, cols, vector: min(copies, vector)
    )
    words = _ops.pack(make_mask("random", (37, 65)), "reference")
    values = torch.randn(71).to(dtype)
    weight = row_weight(values, words, 65)
    assert weight.arguments[0].shape[0] == weight.options[0] == min(copies, 16 // values.itemsize)
    x, exact = torch.randn(3, 65).to(dtype), values.double()
    got = _ops.masked_linear(x, values, words, None, None, backend)
    plain = _ops.masked_linear(x, values, words, None, None, "reference")
    truth = _ops.masked_linear(x.double(), exact, words, None, None, "reference")
    assert_within("y", got, plain, truth)


def compare_linear(case: Linear, dtype: torch.dtype, backend: str) -> None:
    def run(backend: str, x, weight, scores, grad_y):
        x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
        weight = mk.Prototype(weight)
        y = mk.scored_linear(x, weight, scores, mk.TopK(0.5), backend=backend)
        return y.detach(), *torch.autograd.grad(y, (x, scores), grad_y)

    inputs = (torch.randn(case.m, case.k), torch.randn(7), torch.randn(case.m, case.n))
    compare(run, *(t.to(dtype) for t in inputs), torch.randn(case.n, case.k), backend)


def compare_conv2d(
    case: Conv,
    dtype: torch.dtype,
    backend: str,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    def run(backend: str, x, weight, scores, grad_y):
        x = x.contiguous(memory_format=memory_format)
        x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
        y = mk.scored_conv2d(
            x, mk.Prototype(weight), scores, mk.TopK(0.5), **case.geometry, backend=backend
        )
        grad_y = grad_y[: y.numel()].view(y.shape).contiguous(memory_format=memory_format)
        return y.detach(), *torch.autograd.grad(y, (x, scores), grad_y)

    inputs = (torch.randn(case.batch, case.channels, *case.size), torch.randn(7), torch.randn(4096))
    compare(run, *(t.to(dtype) for t in inputs), torch.randn(case.weight_shape), backend)


def compare(run, x, weight, grad_y, scores, backend: str) -> None:
    """Output and gradients by x and scores against the reference, in the dtype and in float64."""
    got, plain = (run(name, x, weight, scores, grad_y) for name in (backend, "reference"))
    truth = run("reference", *(t.double() for t in (x, weight, scores, grad_y)))
    for name, *tensors in zip(("y", "grad x"), got, plain, truth, strict=False):
        assert_within(name, *tensors)
    assert_within("grad scores", got[2], plain[2], truth[2], x.dtype)


@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "period", "dtype", "plan"),
    [
        (1, 4096, 4096, 4096, torch.bfloat16, "planes"),
        (64, 4096, 4096, 64, torch.float16, "planes"),
        (65, 4096, 4096, 64, torch.float16, "tiles"),
        (256, 4096, 4096, 64, torch.float16, "library"),
        (21, 4096, 4096, 1, torch.float32, "planes"),
        (22, 4096, 4096, 1, torch.float32, "tiles"),
        (1, 4096, 4096, 4095, torch.bfloat16, "tiles"),
        (1, 256, 256, 256, torch.bfloat16, "tiles"),
        (64, 256, 256, 7, torch.float32, "library"),
    ],
)
def test_linear_plan(tokens, rows, cols, period, dtype, plan) -> None:
    assert config.linear_plan(tokens, rows, cols, period, dtype) == plan


def test_what_is_fused_stays_with_the_product() -> None:
    """Of many tokens too, unless the weight is large or float32 has no tensor cores."""
    sizes = {(256, torch.bfloat16): "tiles", (4096, torch.bfloat16): "library"}
    for (cols, dtype), plan in {**sizes, (256, torch.float32): "library"}.items():
        assert config.linear_plan(4096, 256, cols, 66, dtype, fused=True) == plan
        expected = "gather" if plan == "tiles" else plan
        assert config.conv_plan(4096, cols, dtype, fused=True) == expected
        assert config.conv_plan(4096, cols, dtype) == "library"


def test_value_copies() -> None:
    """One for each place in a vector as long as all are small beside the weight."""
    assert config.value_copies(period=167_773, count=1 << 24, cols=4096, vector=8) == 8
    assert config.value_copies(period=1 << 20, count=1 << 24, cols=4096, vector=8) == 2
    assert config.value_copies(period=1 << 23, count=1 << 24, cols=4096, vector=8) == 1


def test_small_layers() -> None:
    """Beside one that needs the launches for all of the device, only the very small are."""
    assert config.is_small(1 << 17, largest=1 << 17)
    assert not config.is_small(1 << 17, largest=1 << 18)
    assert config.is_small(1 << 13, largest=1 << 18)


@pytest.mark.parametrize(("period", "cols"), [(None, 1024), (5000, 1024), (369, 256), (64, 64)])
def test_columns_position_by_position(period: int | None, cols: int) -> None:
    """No wider than the values that repeat, which a tile wraps at once."""
    assert config.channels_last_parts_tile(period).cols == cols


def test_parts() -> None:
    assert config.parts(tiles=1, steps=100, programs=264) == 25
    assert config.parts(tiles=100, steps=100, programs=264) == 2
    assert config.parts(tiles=1000, steps=100, programs=264) == 1
    assert config.parts(tiles=1, steps=3, programs=264) == 1
    assert config.parts(tiles=0, steps=0, programs=4) == 1
