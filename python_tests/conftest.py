"""Fixtures: every test runs with uninitialised memory filled with NaN, and op tests run once per
backend.
"""

import os
import signal

import pytest
import torch
from interpreter import patch_once_a_launch
from pairwise import pairwise

from masked_kernels import backends
from masked_kernels.backends import ORDER

_PRESENT = [name for name in ORDER if "this version" not in (backends()[name] or "")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        default="",
        help="comma-separated backends that must be available: a broken build fails, not skips",
    )
    parser.addoption("--backend", help="run only the tests that run on a backend, on this one")
    parser.addoption("--device", default="cpu", help="where tests make tensors; for a GPU: cuda")
    parser.addoption(
        "--pairwise",
        action="store_true",
        help="of each function only as many tests as meet every pair of values of its parameters",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore SIGINT, and so would the processes that tests stop by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Convolutions of plain PyTorch, which tests compare with, would take TF32 on a GPU.
    torch.backends.cudnn.allow_tf32 = False
    for name in filter(None, config.getoption("--require-backend").split(",")):
        if reason := backends()[name]:
            raise pytest.UsageError(f"backend {name!r} is required but unavailable: {reason}")
    if os.environ.get("TRITON_INTERPRET") and backends()["triton"] is None:
        patch_once_a_launch()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN (integers: the largest), so a kernel that leaves an element unwritten
    is seen.
    """
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend = config.getoption("--backend")
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if backend is None or _params_of(item).get("backend") == backend:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    if config.getoption("--pairwise"):
        for name, tests in functions.items():  # values are the same objects in all tests
            rows = [{k: id(value) for k, value in _params_of(test).items()} for test in tests]
            functions[name] = [tests[i] for i in pairwise(rows)]
    chosen = {id(item) for tests in functions.values() for item in tests}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def _params_of(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest):
    with torch.device(request.config.getoption("--device")):
        yield


@pytest.fixture(params=_PRESENT)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends()[request.param]:
        pytest.skip(f"backend {request.param!r} is unavailable: {reason}")
    return request.param
