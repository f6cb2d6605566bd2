"""Single kernels through pytest-benchmark: ``pytest bench --benchmark-only``."""

import pytest
import torch

from .registry import QUICK, Case


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.parametrize("provider", ("ours", "baseline"))
def test_case(benchmark: object, case: Case, provider: str) -> None:
    problem = case.build("auto")
    run = problem.providers[problem.baseline if provider == "baseline" else provider]
    with torch.inference_mode():
        x = problem.inputs[0]
        assert problem.error(run(x), x) <= 2
        benchmark(run, x)  # type: ignore[operator]
