"""The cpu backend on every instruction set of this machine, not only the best: the tests of all
backends, which assert, run on each.
"""

from collections.abc import Iterator

import pytest
import test_functional
import test_packed_sequential
import test_rules
import torch
from cases import CONV, LINEAR, PERIODS, Conv, Linear

from masked_kernels import backends

if reason := backends()["cpu"]:
    pytest.skip(f"backend 'cpu' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.cpu import _native, linear


@pytest.fixture(params=["scalar", "avx2", "avx512"], autouse=True)
def forced_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MASKED_KERNELS_CPU_ISA", request.param)
    _native.isa.cache_clear()
    try:
        assert _native.isa() == request.param
    except ValueError as error:
        pytest.skip(str(error))
    yield
    _native.isa.cache_clear()


@pytest.mark.parametrize("plan", ["planned", "direct"])
@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_masked_linear(
    case: Linear, period: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plan != "planned":  # a kernel that serves any problem, where others are chosen for speed
        monkeypatch.setattr(linear, "linear_plan", lambda *sizes: plan)
    test_functional.test_masked_linear(case, period, torch.float32, "cpu")


@pytest.mark.parametrize("memory_format", test_functional.FORMATS, ids=str)
@pytest.mark.parametrize("period", ["dense", "7"])
@pytest.mark.parametrize("case", CONV, ids=str)
def test_masked_conv2d(case: Conv, period: str, memory_format: torch.memory_format) -> None:
    test_functional.test_masked_conv2d(case, period, torch.float32, memory_format, "cpu")


@pytest.mark.parametrize("case", test_packed_sequential.CASES, ids=str)
def test_masked_conv2d_fused(case: Conv) -> None:
    test_packed_sequential.check(case, "K", "gelu", torch.float32, "cpu")


@pytest.mark.parametrize("kind", ["distinct", "ties", "extreme"])
@pytest.mark.parametrize("shape", [(5, 33), (70, 129)], ids=str)
def test_selection(shape: tuple[int, ...], kind: str) -> None:
    for density in test_rules.DENSITIES:
        test_rules.test_topk_against_loops(shape, kind, density, "cpu")
    for n, m in test_rules.RATIOS:
        test_rules.test_nm_against_loops(shape, kind, n, m, "cpu")
    test_rules.test_threshold_is_strict(shape, "cpu")


def test_large_selection() -> None:
    test_rules.test_large_selection_agrees_with_a_stable_sort("cpu")
    test_rules.test_select_many_is_select_of_each("cpu")
