"""Kernels of the Triton backend that small problems are not sent to, on small problems, and the
choice between kernels.
"""

import pytest
import torch
from cases import DTYPES, Conv, Linear, assert_within, make_mask

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import why_unavailable

if reason := why_unavailable("triton"):
    pytest.skip(f"backend 'triton' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.triton import config, linear_small

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
        got = linear_small.aligned_linear(x, values, words, bias, scale)
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
    got = linear_small.aligned_linear(x, torch.ones(1).bfloat16(), words, None, None)
    torch.testing.assert_close(
        got.double(), x.double().sum(1, keepdim=True).expand(2, 3), rtol=2e-2, atol=0
    )


@triton_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_by_the_library(dtype: torch.dtype, backend: str) -> None:
    compare_linear(Linear(config.many_tokens(dtype), 5, 33), dtype, backend)


@triton_only
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d_by_the_library(dtype: torch.dtype, groups: int, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(config, "conv_plan", lambda *_: "library")
    compare_conv2d(Conv(groups=groups, padding=1, stride=2), dtype, backend)


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
    monkeypatch.setattr(config, "image_tile", lambda *_: config.DepthwiseTile(pixels=16, rows=16))
    x = 1000 + torch.randn(2, 17, 7, 10)
    x[1] += 5
    x = x.contiguous(memory_format=memory_format)
    plain, truth = (_ops.gelu_stats(t, "reference") for t in (x, x.double()))
    assert_within("stats", _ops.gelu_stats(x, backend), plain, truth)
    grad, stats = torch.randn_like(x), plain
    got = _ops.gelu_batch_norm_grad_affine(grad, x, stats, 1e-5, backend)
    plain, truth = (
        _ops.gelu_batch_norm_grad_affine(*tensors, 1e-5, "reference")
        for tensors in ((grad, x, stats), (grad.double(), x.double(), stats.double()))
    )
    assert_within("grads", got, plain, truth)


def compare_linear(case: Linear, dtype: torch.dtype, backend: str) -> None:
    def run(backend: str, x, weight, scores, grad_y):
        x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
        weight = mk.Prototype(weight)
        y = mk.scored_linear(x, weight, scores, mk.TopK(0.5), backend=backend)
        return y.detach(), *torch.autograd.grad(y, (x, scores), grad_y)

    inputs = (torch.randn(case.m, case.k), torch.randn(7), torch.randn(case.m, case.n))
    compare(run, *(t.to(dtype) for t in inputs), torch.randn(case.n, case.k), backend)


def compare_conv2d(case: Conv, dtype: torch.dtype, backend: str) -> None:
    def run(backend: str, x, weight, scores, grad_y):
        x, scores = x.clone().requires_grad_(), scores.clone().requires_grad_()
        y = mk.scored_conv2d(
            x, mk.Prototype(weight), scores, mk.TopK(0.5), **case.geometry, backend=backend
        )
        return y.detach(), *torch.autograd.grad(y, (x, scores), grad_y[: y.numel()].view(y.shape))

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


def test_parts() -> None:
    assert config.parts(tiles=1, steps=100, programs=264) == 25
    assert config.parts(tiles=100, steps=100, programs=264) == 2
    assert config.parts(tiles=1000, steps=100, programs=264) == 1
    assert config.parts(tiles=1, steps=3, programs=264) == 1
    assert config.parts(tiles=0, steps=0, programs=4) == 1
