"""Backend choice: what was asked for runs or says why not; only the automatic choice moves on."""

import logging
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import BackendError, choose, explain, requested, use_backend

registry = sys.modules["masked_kernels.backends"]
X, WORDS = torch.randn(2, 5), torch.zeros(3, 1, dtype=torch.int32)
ARGUMENTS = (X, torch.randn(3, 5), WORDS, None, None)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A backend ahead of all others that refuses odd column counts and records its calls."""
    module = types.SimpleNamespace(calls=[])
    module.why_unavailable = lambda: None
    module.why_not = lambda op, *args: (
        f"{args[0].shape[1]} columns are odd" if args[0].shape[1] % 2 else None
    )

    def masked_linear(*args):
        module.calls.append(args)
        return torch.zeros(args[0].shape[0], args[2].shape[0])

    module.masked_linear = masked_linear
    real_module, real_why = registry._module, registry.why_unavailable
    monkeypatch.setattr(registry, "ORDER", ("picky", *registry.ORDER))
    monkeypatch.setattr(
        registry, "_module", lambda name: module if name == "picky" else real_module(name)
    )
    monkeypatch.setattr(
        registry, "why_unavailable", lambda name: None if name == "picky" else real_why(name)
    )
    monkeypatch.setattr(registry, "_function", lambda name, op: getattr(registry._module(name), op))
    registry._log_once.cache_clear()
    return module


def test_order_and_reasons() -> None:
    assert list(mk.backends()) == ["cuda", "triton", "cpu", "reference"]
    assert mk.backends()["reference"] is None
    assert all(reason is None or isinstance(reason, str) for reason in mk.backends().values())


@pytest.mark.parametrize("environment", ["", "reference"])
def test_precedence(environment: str) -> None:
    printed = run_with_environment(
        environment,
        """
        from masked_kernels.backends import requested, use_backend
        print(requested(), requested("cpu"))
        with use_backend("auto"):
            print(requested())
            with use_backend("cpu"):
                print(requested(), requested("reference"))
            print(requested())
        print(requested())
        """,
    ).stdout
    first = environment or "auto"
    assert printed.split() == [first, "cpu", "auto", "cpu", "reference", "auto", first]


def test_an_unknown_name_in_the_environment_is_told() -> None:
    failed = run_with_environment(
        "fast",
        """
        import torch, masked_kernels as mk
        mk.TopK()(torch.ones(2, 2))
        """,
    )
    assert "backend: got 'fast', expected one of auto" in failed.stderr


def run_with_environment(value: str, code: str) -> subprocess.CompletedProcess[str]:
    """The variable is read once, at import."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "MASKED_KERNELS_BACKEND": value},
        capture_output=True,
        text=True,
    )


def test_use_backend_is_undone_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert requested() == "auto"
    with pytest.raises(ValueError, match="backend: got 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(BackendError, match="'cuda' is unavailable: "), use_backend("cuda"):
        pass


def test_forced_backend_runs(picky: types.SimpleNamespace) -> None:
    arguments = (torch.randn(2, 4), *ARGUMENTS[1:])
    _ops.masked_linear(*arguments, "picky")
    assert len(picky.calls) == 1
    with use_backend("picky"):
        _ops.masked_linear(*arguments, "auto")
    assert len(picky.calls) == 2
    _ops.masked_linear(*arguments, "auto")
    assert len(picky.calls) == 3
    _ops.masked_linear(*arguments[:1], torch.randn(4), *arguments[2:], "reference")
    assert len(picky.calls) == 3


def test_explicit_request_never_falls_back(picky: types.SimpleNamespace) -> None:
    with pytest.raises(
        BackendError, match="backend 'picky' cannot run masked_linear: 5 columns are odd"
    ):
        _ops.masked_linear(*ARGUMENTS, "picky")
    with pytest.raises(BackendError, match="backend 'cuda' cannot run masked_linear: "):
        _ops.masked_linear(*ARGUMENTS, "cuda")
    assert picky.calls == []


def test_automatic_choice_moves_on_and_says_so_once(
    picky, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="masked_kernels"):
        for _ in range(3):
            assert choose("masked_linear", "auto", *ARGUMENTS) != "picky"
    assert [r.message for r in caplog.records] == [
        "masked_linear: backend picky not used: 5 columns are odd"
    ]
    assert explain("masked_linear", *ARGUMENTS)["picky"] == "5 columns are odd"
    assert explain("masked_linear", *ARGUMENTS)["reference"] is None


def test_backward_runs_on_the_requested_backend(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, str]] = []
    real = registry._function

    def recorded(name: str, op: str):
        used.append((name, op))
        return real(name, op)

    monkeypatch.setattr(registry, "_function", recorded)
    x, scores = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    mk.scored_linear(x, torch.randn(3, 5), scores, mk.TopK(), backend=backend).sum().backward()
    assert {name for name, _ in used} == {backend}
    assert {op for _, op in used} == {
        "select_topk",
        "masked_linear",
        "masked_linear_grad_x",
        "scored_linear_grad_scores",
    }


def test_every_backend_has_every_op(backend: str) -> None:
    """Or refuses it by name, whatever the arguments."""
    module = registry._module(backend)
    missing = [name for name in _ops.NAMES if not callable(getattr(module, name, None))]
    assert all(module.why_not(name) for name in missing)
