"""masked_* and scored_*: outputs and every gradient against float64, on every backend."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    CONV,
    DTYPES,
    LINEAR,
    MASKS,
    PERIODS,
    Conv,
    Linear,
    assert_within,
    dense,
    make_mask,
    make_weight,
)
from torch import Tensor

import masked_kernels as mk

RULES = (
    mk.TopK(0.5),
    mk.TopK(0.3, absolute=False),
    mk.Threshold(0.1),
    mk.Threshold(0.0, rescale=True),
    mk.NM(2, 4),
)
FORMATS = (torch.contiguous_format, torch.channels_last)
SCALE = 1.7
NAMES = ("y", "grad x", "grad bias", "grad weight")  # the last of a dense weight only


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def plain_grads(function, inputs, weight, mask, scale, grad_y, dtype):
    """Output and gradients (inputs, then w_eff) of plain PyTorch in ``dtype``, same numbers."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    effective = (torch.where(mask, weight.to(dtype), 0) * scale).requires_grad_()
    y = function(leaves[0], effective, *leaves[1:])
    return y.detach(), *torch.autograd.grad(y, [*leaves, effective], grad_y.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_masked_linear(case: Linear, period: str, dtype: torch.dtype, backend: str) -> None:
    shape = (case.n, case.k)
    inputs = linear_inputs(case, dtype)
    weight = make_weight(period, shape, dtype)
    for kind in MASKS:
        mask = make_mask(kind, shape)
        draws = [inputs]
        if case.m <= 3 and period in ("1", "2K") and kind == "all":
            # All outputs of a token are one or two sums, whose error in plain PyTorch is luck: that
            # of many, together.
            draws += [linear_inputs(case, dtype) for _ in range(31)]
        results = [linear_results(*each, weight, mask, backend) for each in draws]
        for name, *of_draws in zip(NAMES, *results, strict=False):
            got, plain, truth = (torch.stack(draw) for draw in zip(*of_draws, strict=True))
            assert_within(f"{kind} {name}", got, plain, truth)


def linear_inputs(case: Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, bias and the gradient of y."""
    return (
        leaf(case.m, case.k, dtype=dtype),
        leaf(case.n, dtype=dtype),
        torch.randn(case.m, case.n).to(dtype),
    )


def linear_results(
    x: Tensor,
    bias: Tensor,
    grad_y: Tensor,
    weight: Tensor | mk.Prototype,
    mask: Tensor,
    backend: str,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of y and the gradients of x, bias and a dense weight: ours, plain PyTorch's and the truth."""
    inputs = [x, bias]
    if isinstance(weight, Tensor):
        inputs.append(weight.requires_grad_())
    y = mk.masked_linear(
        x, weight, mk.PackedMask.from_bool(mask), bias, scale=SCALE, backend=backend
    )
    got = (y.detach(), *torch.autograd.grad(y, inputs, grad_y))
    written = dense(weight, mask.shape).detach()
    truth, plain = (
        plain_grads(F.linear, (x, bias), written, mask, SCALE, grad_y, d)
        for d in (torch.float64, x.dtype)
    )
    if isinstance(weight, Tensor):
        plain, truth = ((*g[:3], SCALE * torch.where(mask, g[3], 0)) for g in (plain, truth))
    return list(zip(got, plain, truth, strict=False))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("case", CONV, ids=str)
def test_masked_conv2d(
    case: Conv, period: str, dtype: torch.dtype, memory_format: torch.memory_format, backend: str
) -> None:
    check_masked_conv2d(case, period, dtype, memory_format, "random", backend)


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "random"])
@pytest.mark.parametrize("case", CONV, ids=str)
def test_masked_conv2d_of_other_masks(case: Conv, kind: str, backend: str) -> None:
    check_masked_conv2d(case, "7", torch.float32, torch.channels_last, kind, backend)


def check_masked_conv2d(
    case: Conv,
    period: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    kind: str,
    backend: str,
) -> None:
    weight = make_weight(period, case.weight_shape, dtype)
    written = dense(weight, case.weight_shape)
    mask = make_mask(kind, case.weight_shape)
    bias = leaf(case.outputs, dtype=dtype)

    def conv(x, w, b):
        return F.conv2d(x, w, b, **case.geometry)

    x = torch.randn(case.batch, case.channels, *case.size).to(dtype)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    inputs = [x, bias, *([weight.requires_grad_()] if isinstance(weight, Tensor) else [])]
    y = mk.masked_conv2d(
        x,
        weight,
        mk.PackedMask.from_bool(mask),
        bias,
        **case.geometry,
        scale=SCALE,
        backend=backend,
    )
    grad_y = torch.randn(y.shape).to(dtype).contiguous(memory_format=memory_format)
    got = (y.detach(), *torch.autograd.grad(y, inputs, grad_y))
    truth, plain = (
        plain_grads(conv, (x, bias), written.detach(), mask, SCALE, grad_y, d)
        for d in (torch.float64, dtype)
    )
    for name, *tensors in zip(("y", "grad x", "grad bias"), got, plain, truth, strict=False):
        assert_within(name, *tensors)
    if period == "dense":
        assert_within(
            "grad weight", got[3], *(SCALE * torch.where(mask, g[3], 0) for g in (plain, truth))
        )
    if case.batch and case.size != (1, 1):
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("period", ("dense", "7", "K+3"))
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_scored_linear(
    case: Linear, dtype: torch.dtype, rule: mk.Rule, period: str, backend: str
) -> None:
    shape = (case.n, case.k)
    x, bias, scores = (
        leaf(case.m, case.k, dtype=dtype),
        leaf(case.n, dtype=dtype),
        leaf(*shape, dtype=torch.float32),
    )
    grad_y = torch.randn(case.m, case.n).to(dtype)
    with mk.use_backend("reference"):
        mask = rule(scores).unpack()
    weight = make_weight(period, shape, dtype)
    y = mk.scored_linear(x, weight, scores, rule, bias, backend=backend)
    got = (y.detach(), *torch.autograd.grad(y, (x, bias, scores), grad_y))
    check_scored(got, F.linear, (x, bias), dense(weight, shape), scores, mask, rule, grad_y, dtype)


@pytest.mark.parametrize(
    ("period", "memory_format"),
    [
        ("dense", torch.channels_last),
        ("7", torch.contiguous_format),
        ("2K", torch.channels_last),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV, ids=str)
def test_scored_conv2d(
    case: Conv,
    dtype: torch.dtype,
    rule: mk.Rule,
    period: str,
    memory_format: torch.memory_format,
    backend: str,
) -> None:
    bias, scores = leaf(case.outputs, dtype=dtype), leaf(*case.weight_shape, dtype=torch.float32)
    with mk.use_backend("reference"):
        mask = rule(scores).unpack()

    def conv(x, w, b):
        return F.conv2d(x, w, b, **case.geometry)

    weight = make_weight(period, case.weight_shape, dtype)
    x = torch.randn(case.batch, case.channels, *case.size).to(dtype)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y = mk.scored_conv2d(x, weight, scores, rule, bias, **case.geometry, backend=backend)
    grad_y = torch.randn(y.shape).to(dtype)
    got = (y.detach(), *torch.autograd.grad(y, (x, bias, scores), grad_y))
    check_scored(
        got,
        conv,
        (x, bias),
        dense(weight, case.weight_shape),
        scores,
        mask,
        rule,
        grad_y,
        dtype,
    )


def check_scored(got, function, inputs, weight, scores, mask, rule, grad_y, dtype) -> None:
    """The score gradient is dL/dw_eff times w everywhere, times the rescale, times sign(score)
    where |score| is ranked.
    """
    rescaled = isinstance(rule, mk.Threshold) and rule.rescale and mask.any()
    scale = float(mask.double().mean()) ** -0.5 if rescaled else 1.0
    truth, plain = (
        plain_grads(function, inputs, weight, mask, scale, grad_y, d)
        for d in (torch.float64, dtype)
    )
    for name, *tensors in zip(("y", "grad x", "grad bias"), got, plain, truth, strict=False):
        assert_within(name, *tensors)
    sign = scores.detach().sign() if rule.absolute else 1
    plain_scores = (scale * plain[3] * weight * sign).to(scores.dtype)
    assert_within(
        "grad scores", got[3], plain_scores, scale * truth[3] * weight.double() * sign, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("period", ["dense", "K", "K+3"])
def test_large_layer(period: str, dtype: torch.dtype, backend: str) -> None:
    """Large enough for several blocks, panels and threads: rounding must not pile up with them."""
    shape = (2048, 2048)
    weight, mask = make_weight(period, shape, dtype), make_mask("random", shape)
    x, bias = leaf(5, shape[1], dtype=dtype), leaf(shape[0], dtype=dtype)
    grad_y = torch.randn(5, shape[0]).to(dtype)
    y = mk.masked_linear(x, weight, mk.PackedMask.from_bool(mask), bias, backend=backend)
    got = (y.detach(), *torch.autograd.grad(y, (x, bias), grad_y))
    written = dense(weight, shape)
    plain, truth = (
        plain_grads(F.linear, (x, bias), written, mask, 1, grad_y, d)
        for d in (dtype, torch.float64)
    )
    for name, *tensors in zip(("y", "grad x", "grad bias"), got, plain, truth, strict=False):
        assert_within(name, *tensors)


def test_linear_against_loops(backend: str) -> None:
    for case in (Linear(3, 5, 7), Linear(2, 4, 33), Linear(1, 3, 65)):
        x, bias = torch.randn(case.m, case.k), torch.randn(case.n)
        for period in PERIODS:
            weight, mask = (
                make_weight(period, (case.n, case.k), torch.float32),
                torch.rand(case.n, case.k) < 0.5,
            )
            values = (
                weight.values if isinstance(weight, mk.Prototype) else weight.flatten()
            ).tolist()
            flat = oracle.fill(values, case.n * case.k)
            rows = [flat[i * case.k : (i + 1) * case.k] for i in range(case.n)]
            expected = oracle.linear(x.tolist(), rows, mask.tolist(), bias.tolist())
            y = mk.masked_linear(x, weight, mk.PackedMask.from_bool(mask), bias, backend=backend)
            torch.testing.assert_close(
                y.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
            )


def test_conv2d_against_loops(backend: str) -> None:
    for case in (
        Conv(batch=1, stride=2, padding=1, groups=2),
        Conv(batch=1, channels=3, outputs=3, groups=3, dilation=2),
    ):
        x, bias = torch.randn(case.batch, case.channels, *case.size), torch.randn(case.outputs)
        weight, mask = torch.randn(case.weight_shape), torch.rand(case.weight_shape) < 0.5
        pairs = ((v, v) for v in (case.stride, case.padding, case.dilation))
        expected = oracle.conv2d(
            x.tolist(), weight.tolist(), mask.tolist(), bias.tolist(), *pairs, case.groups
        )
        y = mk.masked_conv2d(
            x, weight, mk.PackedMask.from_bool(mask), bias, **case.geometry, backend=backend
        )
        torch.testing.assert_close(
            y.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
        )


def test_literal_values(backend: str) -> None:
    mask = mk.PackedMask.from_bool(torch.tensor([[True, False, True], [False, True, True]]))
    y = mk.masked_linear(
        torch.tensor([[1.0, 2.0, 3.0]]),
        mk.Prototype(torch.tensor([10.0, 20.0])),
        mask,
        backend=backend,
    )
    # flat prototype: 10 20 10 | 20 10 20, so w ⊙ m = [10 0 10], [0 10 20]
    assert y.tolist() == [[40.0, 80.0]]


@pytest.mark.parametrize("layout", ["leading", "vector", "transposed", "expanded", "sliced"])
def test_x_layouts(layout: str, backend: str) -> None:
    weight, mask = torch.randn(5, 33), mk.PackedMask.from_bool(torch.rand(5, 33) < 0.5)
    x = {
        "leading": torch.randn(2, 3, 33),
        "vector": torch.randn(33),
        "transposed": torch.randn(33, 4).t(),
        "expanded": torch.randn(33).expand(6, 33),
        "sliced": torch.randn(4, 70)[:, 3:69:2],
    }[layout]
    y = mk.masked_linear(x, weight, mask, backend=backend)
    torch.testing.assert_close(
        y, F.linear(x, torch.where(mask.unpack(), weight, 0)), rtol=1e-4, atol=1e-5
    )


def test_weight_layouts(backend: str) -> None:
    """The flat order is row-major whatever the memory format."""
    x, mask = torch.randn(2, 8, 5, 5), torch.rand(6, 8, 3, 3) < 0.5
    weight = torch.randn(6, 8, 3, 3)
    packed = mk.PackedMask.from_bool(mask)
    expected = mk.masked_conv2d(x, weight, packed, backend=backend)
    last = {"memory_format": torch.channels_last}
    assert mk.PackedMask.from_bool(mask.contiguous(**last)) == packed
    torch.testing.assert_close(
        mk.masked_conv2d(x, weight.contiguous(**last), packed, backend=backend), expected
    )
    wide = torch.randn(6, 16, 3, 3)
    assert mk.TopK()(wide[:, ::2]) == mk.TopK()(wide[:, ::2].clone())


@pytest.mark.parametrize(
    "function", ["masked_linear", "scored_linear", "masked_conv2d", "scored_conv2d"]
)
def test_gradcheck(function: str) -> None:
    """Finite differences in float64. The mask does not move under a small step, so scores get no
    numerical gradient here.
    """
    conv = "conv" in function
    shape = (4, 2, 3, 3) if conv else (4, 6)
    x = torch.randn((2, 4, 5, 5) if conv else (3, 6), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(shape, dtype=torch.float64)
    kwargs = {"groups": 2, "padding": 1} if conv else {}
    mask = mk.TopK()(scores)

    def run(x, weight, bias):
        if function.startswith("masked"):
            return getattr(mk, function)(x, weight, mask, bias, scale=SCALE, **kwargs)
        return getattr(mk, function)(x, weight, scores, mk.TopK(), bias, **kwargs)

    assert torch.autograd.gradcheck(run, (x, weight, bias))


def test_autocast() -> None:
    x, scores = torch.randn(3, 40, requires_grad=True), torch.randn(5, 40, requires_grad=True)
    prototype, bias = mk.Prototype(torch.randn(7)), torch.randn(5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mk.scored_linear(x, prototype, scores, mk.TopK(), bias)
        z = mk.masked_conv2d(
            torch.randn(1, 4, 3, 3),
            torch.randn(2, 4, 1, 1),
            mk.PackedMask.from_bool(torch.ones(2, 4, 1, 1).bool()),
        )
    assert y.dtype == z.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == scores.grad.dtype == bias.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            mk.masked_linear(
                x.double(), mk.Prototype(torch.ones(3).double()), mk.TopK()(scores)
            ).dtype
            == torch.float64
        )


def test_second_derivative_is_refused() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    y = mk.masked_linear(x, torch.randn(3, 8), mk.PackedMask.from_bool(torch.ones(3, 8).bool()))
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
