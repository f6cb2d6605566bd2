"""Fixtures: every test runs with uninitialised memory filled with NaN, and op tests run once per
backend.
"""

import pytest
import torch

from masked_kernels import backends
from masked_kernels.backends import ORDER

_PRESENT = [name for name in ORDER if "this version" not in (backends()[name] or "")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        default="",
        help="comma-separated backends that must be available: a broken build fails, not skips",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in filter(None, config.getoption("--require-backend").split(",")):
        if reason := backends()[name]:
            raise pytest.UsageError(f"backend {name!r} is required but unavailable: {reason}")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN (integers: the largest), so a kernel that leaves an element unwritten
    is seen.
    """
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_PRESENT)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends()[request.param]:
        pytest.skip(f"backend {request.param!r} is unavailable: {reason}")
    return request.param
