"""Fixtures: every test runs with uninitialised memory filled with NaN, and op tests run once per
backend.
"""

import signal
from collections import Counter

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
    parser.addoption("--backend", help="run only the tests that run on a backend, on this one")
    parser.addoption("--device", default="cpu", help="where tests make tensors; for a GPU: cuda")
    parser.addoption(
        "--every",
        type=int,
        default=1,
        help="run every Nth test of each function that has over 30; choose N prime to the lengths "
        "of their lists of parameters, so that every value of each is still met",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore SIGINT, and so would the processes that tests stop by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend, every = config.getoption("--backend"), config.getoption("--every")
    asked = [item for item in items if backend is None or _backend_of(item) == backend]
    size = Counter(map(_function_of, asked))
    seen: Counter[str] = Counter()
    chosen = []
    for item in asked:
        function = _function_of(item)
        if size[function] <= 30 or seen[function] % every == 0:
            chosen.append(item)
        seen[function] += 1
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _backend_of(item: pytest.Item) -> object:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend") if callspec else None


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest):
    with torch.device(request.config.getoption("--device")):
        yield


@pytest.fixture(params=_PRESENT)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends()[request.param]:
        pytest.skip(f"backend {request.param!r} is unavailable: {reason}")
    return request.param
