"""Single kernels through pytest-benchmark: ``pytest bench --benchmark-only``.

``-k`` chooses cases by parts of their names: ``-k "linear and 4096x4096 and aligned and ours"``.
"""

import pytest
import torch

from .cases import conv2d, linear, select
from .problem import Case
from .run import check


@pytest.mark.parametrize("provider", ("ours", "dense"))
@pytest.mark.parametrize(
    "case", (*select.CASES, *linear.CASES, *conv2d.CASES), ids=lambda case: case.name
)
def test_case(benchmark: object, case: Case, provider: str) -> None:
    problem = case.build("auto")
    name = problem.dense[0] if provider == "dense" else provider
    made = problem.providers[name]()
    with torch.inference_mode():
        check(case.name, problem, {name: made})
        argument = made.prepare(problem.example())
        refresh = made.refresh
        if refresh is None:
            benchmark(made.run, argument)  # type: ignore[operator]
            return
        benchmark.pedantic(  # type: ignore[attr-defined]
            made.run, setup=lambda: ((refresh(argument),), {}), rounds=50
        )
