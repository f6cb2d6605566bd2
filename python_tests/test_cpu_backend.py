"""Decisions of the cpu backend: which kernel runs, and what it keeps of a mask."""

import dataclasses
import gc
import json
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within

from masked_kernels import _ops
from masked_kernels.backends import backends, explain_choice, use_backend

if reason := backends()["cpu"]:
    pytest.skip(f"backend 'cpu' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.cpu import _relaid, aligned, linear, product
from masked_kernels.backends.cpu._native import isa as native_isa
from masked_kernels.backends.cpu._native import native
from masked_kernels.backends.cpu.plan import (
    PLANS,
    Bounds,
    Plan,
    Product,
    bounds_of,
    grad_weight_plan,
    grad_x_plan,
    linear_decision,
    linear_plan,
    many_pixels,
    row_patterns,
)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "period", "dtype", "isa", "plan"),
    [
        (1, 4096, 4096, 4096, F32, "avx512", "aligned"),
        (4096, 4096, 4096, 64, F32, "avx512", "aligned"),
        (8, 512, 256, 1024, F32, "avx512", "aligned"),
        (64, 128, 256, 1024, F32, "avx512", "panels"),  # fewer than 64 rows a pattern
        (8, 256, 256, 1024, F32, "avx512", "direct"),
        (1, 4096, 4096, 167_773, F32, "avx512", "direct"),
        (4096, 4096, 4096, 167_773, F32, "avx512", "panels"),
        (1, 4096, 4096, 4096 * 4096, F32, "avx512", "direct"),
        (1, 4096, 4096, 4096, F32, "avx2", "aligned"),
        (4096, 4096, 4096, 4096, F32, "avx2", "aligned"),
        (8, 4096, 4096, 167_773, F32, "avx2", "direct"),
        (9, 4096, 4096, 167_773, F32, "avx2", "panels"),
        (1, 4096, 4096, 4096, F32, "scalar", "panels"),
        (1, 4096, 4096, 4096, F64, "avx512", "panels"),
        (1, 4096, 4096, 4096, BF16, "avx512", "aligned"),
        (512, 4096, 4096, 4096, BF16, "avx512", "panels"),
        (1, 4096, 4096, 4096 * 4096, BF16, "avx512", "panels"),
    ],
)
def test_linear_plan(tokens, rows, cols, period, dtype, isa, plan) -> None:
    assert linear_plan(tokens, rows, cols, period, dtype, isa) == plan


@pytest.mark.parametrize(
    ("sizes", "dtype", "decision"),
    [
        ((1, 64, 64, 64), F32, ("aligned", "rows per pattern 64 ≥ 4")),
        ((64, 64, 64, 512), F32, ("panels", "tokens 64 > 16")),  # 8 rows a pattern are too few
        ((16, 64, 64, 50), F32, ("direct", "tokens 16 ≤ 16")),
        ((16, 64, 2048, 50), F32, ("direct", "tokens 16 ≤ 32")),
        ((8, 64, 64, 64 * 64), F32, ("panels", "tokens 8 > 2")),
        ((1, 64, 64, 64 * 64), BF16, ("panels", "a dense weight in torch.bfloat16")),
        ((64, 64, 64, 64), BF16, ("panels", "tokens 64 > 32 in torch.bfloat16")),
        ((64, 64, 64, 64), torch.float16, ("panels", "tokens 64 > 16")),
        ((1, 64, 64, 64), F64, ("panels", "the other kernels compute in float32")),
    ],
)
def test_decisions_say_why(sizes, dtype, decision) -> None:
    bounds = Bounds(aligned_rows=(4, 16), direct_tokens=(32, 16, 2, 8))
    assert linear_decision(*sizes, dtype, bounds) == decision


@pytest.mark.parametrize(
    ("tokens", "dtype", "decision"),
    [
        (8, F32, ("direct", "tokens 8 ≤ 8")),
        (9, F32, ("panels", "tokens 9 > 8")),
        (1, BF16, ("panels", "a dense weight in torch.bfloat16")),
    ],
)
def test_compact_weights_are_never_aligned(tokens, dtype, decision) -> None:
    bounds = Bounds(aligned_rows=(4, 16), direct_tokens=(32, 16, 2, 8))
    assert linear_decision(tokens, 64, 64, 64, dtype, bounds, compact=True) == decision


def test_bounds_are_shipped_for_every_isa() -> None:
    table = json.loads(PLANS.read_text())
    assert set(table) == {"avx512", "avx2", "scalar"}
    for isa, fields in table.items():
        assert bounds_of(isa) == Bounds(*map(tuple, fields.values()))
        assert list(fields) == [field.name for field in dataclasses.fields(Bounds)]
    assert bounds_of("some other") == Bounds()


def test_choice_is_explained() -> None:
    x, words = torch.randn(1, 64), _ops.pack(torch.rand(32, 64) < 0.5, "cpu")
    arguments = (x, torch.randn(64), words, None, None)
    plan, why = linear_decision(1, 32, 64, 64, F32, bounds_of(native_isa()))
    with use_backend("cpu"):
        assert explain_choice("masked_linear", *arguments) == f"cpu: {plan} ({why})"
        assert explain_choice("pack", torch.ones(2, 2, dtype=torch.bool)) == "cpu"


@pytest.mark.parametrize("plan", get_args(Plan))
def test_every_plan_is_right(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table says, so that measuring it anew cannot break results."""
    monkeypatch.setattr(linear, "linear_plan", lambda *_: plan)
    for tokens in (1, 3, 40):
        x, values = torch.randn(tokens, 64), torch.randn(64)
        mask = torch.rand(33, 64) < 0.5
        y = _ops.masked_linear(x, values, _ops.pack(mask, "cpu"), None, None, "cpu")
        weight = values * mask
        truth = x.double() @ weight.double().t()
        plain = float((torch.nn.functional.linear(x, weight).double() - truth).norm())
        rounding = float(torch.finfo(F32).eps * truth.norm())
        assert float((y.double() - truth).norm()) <= 2 * max(plain, rounding)


@pytest.mark.parametrize(
    ("sizes", "dtype", "isa", "grad_weight", "grad_x"),
    [
        ((4160, 512, 512), F32, "avx512", "convolution", "convolution"),
        ((64, 512, 512), F32, "avx512", "matrix", "convolution"),
        ((512, 2048, 2048), F32, "avx512", "matrix", "convolution"),
        ((1024, 2048, 2048), F32, "avx512", "convolution", "convolution"),
        ((4160, 4096, 4096), F32, "avx512", "matrix", "convolution"),
        ((63, 512, 512), F32, "avx512", "matrix", "matrix"),
        ((4160, 512, 512), F64, "avx512", "matrix", "matrix"),
        ((4160, 512, 512), F32, "avx2", "matrix", "matrix"),
        ((4160, 0, 512), F32, "avx512", "matrix", "matrix"),
    ],
)
def test_product_plans(sizes, dtype, isa, grad_weight, grad_x) -> None:
    assert grad_weight_plan(*sizes, dtype, isa) == grad_weight
    assert grad_x_plan(*sizes, dtype, isa) == grad_x


def test_the_library_serves_fewer_pixels_with_avx512() -> None:
    assert many_pixels("avx512") < many_pixels("avx2") == many_pixels("scalar")


@pytest.mark.parametrize("plan", get_args(Product))
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 1, 1), (129, 33, 1), (64, 1, 65)])
def test_every_product_is_right(
    tokens: int, rows: int, cols: int, plan: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "grad_weight_plan", lambda *_: plan)
    monkeypatch.setattr(product, "grad_x_plan", lambda *_: plan)
    grad_y, x, weight = (
        torch.randn(*size) for size in ((tokens, rows), (tokens, cols), (rows, cols))
    )
    for got, (a, b) in (
        (product.grad_weight(grad_y, x), (grad_y.t(), x)),
        (product.grad_x(grad_y, weight), (grad_y, weight)),
    ):
        assert got.is_contiguous()
        assert_within("product", got, a @ b, a.double() @ b.double())


def test_row_patterns() -> None:
    assert row_patterns(12, 1) == row_patterns(12, 4) == row_patterns(12, 12) == 1
    assert row_patterns(12, 36) == 3
    assert row_patterns(12, 5) is row_patterns(12, 18) is None
    assert row_patterns(0, 5) == row_patterns(5, 0) == 1


def test_tiles_follow_the_words() -> None:
    """Re-laid bits are kept while the mask lives, and made anew when its words change."""
    words = _ops.pack(torch.rand(32, 64) < 0.5, "cpu")
    first = aligned._tiles(words, 64, 1)
    assert aligned._tiles(words, 64, 1) is first
    assert aligned._tiles(words, 64, 2).shape == first.shape
    words.zero_()
    assert int(aligned._tiles(words, 64, 1).abs().sum()) == 0
    with torch.inference_mode():
        fresh = _ops.pack(torch.ones(32, 64, dtype=torch.bool), "cpu")
        kept = aligned._tiles(fresh, 64, 1)
        fresh.zero_()
        assert int(aligned._tiles(fresh, 64, 1).abs().sum()) == 0
        assert int(kept.abs().sum()) > 0
    count = len(_relaid._kept)
    del words
    gc.collect()
    assert len(_relaid._kept) == count - 1


def test_a_prepared_chain_knows_its_images_and_copies() -> None:
    """It holds pointers: the bytes of another tensor must not be read as one."""
    image, words = torch.randn(2, 5, 6, 4), _ops.pack(torch.ones(4, 9, dtype=torch.bool), "cpu")
    depthwise = [0, 0, *(3, 3, 1, 1, 1, 1, 1, 1)]
    affine = torch.tensor([[1.0], [0.0], [1.0], [0.0]]).repeat(1, 4)
    chain = native().prepare_chain(
        image, [torch.ones(1)], [words], [affine], ["identity"], depthwise
    )
    run = native().masked_conv2d_chain
    expected = F.conv2d(image.permute(0, 3, 1, 2), torch.ones(4, 1, 3, 3), padding=1, groups=4)
    torch.testing.assert_close(run(image, chain), expected.permute(0, 2, 3, 1))
    for x, prepared, message in (
        (image[:, :4].contiguous(), chain, "x: images of 4x6x4, expected 5x6x4"),
        (image, chain.clone(), "got a copy"),
        (image, chain[1:], "did not make"),
        (image, affine, "did not make"),
    ):
        with pytest.raises(ValueError, match=message):
            run(x, prepared)
