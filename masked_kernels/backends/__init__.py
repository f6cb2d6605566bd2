"""Which backend runs an op, and why not the others.

A backend is a module of this folder with functions named after the ops of ``_ops.py``,
``why_unavailable() -> str | None`` and ``why_not(op, *args) -> str | None``. Listing its name in
``ORDER`` is all the registration there is. Where they apply it also has
``kernel_choice(op, *args) -> str | None``, if it chooses among kernels; ``bind(op, *args)``, if it
can choose for all calls like one at once; ``forget_thresholds()``, if it remembers where a tensor's
top-k threshold was; ``check_scores()``, if it does not raise for a NaN at once.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

ORDER = ("cuda", "triton", "cpu", "reference")
AUTO = "auto"
ENVIRONMENT_VARIABLE = "MASKED_KERNELS_BACKEND"

_log = logging.getLogger("masked_kernels")

# Process-wide rather than a ContextVar: autograd runs the backward of a GPU graph in threads of its
# own, and those must obey too.
_requested = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run the op."""


def backends() -> dict[str, str | None]:
    """Every backend's name, best first, to None if it can be used here or the reason why not."""
    return {name: why_unavailable(name) for name in ORDER}


@functools.cache
def why_unavailable(name: str) -> str | None:
    """None if the backend ``name`` can be used in this process, else the reason why not."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return f"this version of masked_kernels has no {name} backend"
    reason: str | None = _module(name).why_unavailable()
    return reason


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the ``with`` block on one backend; ``"auto"`` restores the automatic choice.

    The setting belongs to the process, threads included. A ``backend=`` argument beats it; it beats
    the environment variable ``MASKED_KERNELS_BACKEND``, which is read at import. Raises
    ``ValueError`` for an unknown name and ``BackendError`` for one that is unavailable here.
    """
    global _requested
    check_name(name)
    if name != AUTO and (reason := why_unavailable(name)):
        raise BackendError(f"backend {name!r} is unavailable: {reason}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def check_name(name: str) -> None:
    if name != AUTO and name not in ORDER:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join((AUTO, *ORDER))}")


def requested(argument: str = AUTO) -> str:
    """The name in force: the argument, else ``use_backend``, else the environment, else auto."""
    return _requested if argument == AUTO else argument


def select(op: str, argument: str, *args: Any) -> Callable[..., Any]:
    """The function that runs ``op`` on ``args``, of the backend that ``choose`` names."""
    return _function(choose(op, argument, *args), op)


def bind(op: str, argument: str, x: Any, *operands: Any) -> Callable[[Any], Any]:
    """What runs ``op`` on tensors like ``x`` (its sizes, strides, dtype, device) and these other
    operands, as long as nothing but numbers changes, with all decided beforehand.
    """
    name = choose(op, argument, x, *operands)
    bind_here = getattr(_module(name), "bind", None)
    bound: Callable[[Any], Any] | None = bind_here and bind_here(op, x, *operands)
    if bound is not None:
        return bound
    function = _function(name, op)
    return lambda x: function(x, *operands)


def choose(op: str, argument: str, *args: Any) -> str:
    """The backend for ``op`` on ``args``: the first that can run it unless one was asked for.

    One asked for by name that cannot run it raises ``BackendError``.
    """
    name = requested(argument)
    check_name(name)
    if name != AUTO:
        if reason := why_not(name, op, *args):
            raise BackendError(f"backend {name!r} cannot run {op}: {reason}")
        return name
    for candidate in _usable(ORDER):
        reason = _module(candidate).why_not(op, *args)
        if reason is None:
            return candidate
        _log_once(op, candidate, reason)
    raise BackendError(f"no backend can run {op}: {explain(op, *args)}")


def why_not(name: str, op: str, *args: Any) -> str | None:
    """None if the backend ``name`` can run ``op`` on ``args``, else the reason why not."""
    if reason := why_unavailable(name):
        return reason
    reason_not: str | None = _module(name).why_not(op, *args)
    return reason_not


def explain(op: str, *args: Any) -> dict[str, str | None]:
    """Every backend's name, best first, to None if it can run the call or the reason why not."""
    return {name: why_not(name, op, *args) for name in ORDER}


def explain_choice(op: str, *args: Any, backend: str = AUTO) -> str:
    """The backend that would run the call, and, where it chooses among kernels, which and why:
    ``"cpu: aligned (rows per pattern 4096 ≥ 16)"``.

    Raises ``BackendError`` if none can.
    """
    name = choose(op, backend, *args)
    kernel_choice = getattr(_module(name), "kernel_choice", None)
    chosen = None if kernel_choice is None else kernel_choice(op, *args)
    return name if chosen is None else f"{name}: {chosen}"


def forget_thresholds() -> None:
    """Start the next selections from nothing, as if no tensor had been selected from: for measuring
    how long that takes. Masks do not depend on it.
    """
    _call_each("forget_thresholds")


def check_scores() -> None:
    """Wait for the selections so far and raise ``ValueError`` if a score was NaN. On a GPU, where a
    selection does not wait, the error comes from here or from a later selection.
    """
    _call_each("check_scores")


def _call_each(function: str) -> None:
    """Of every usable backend that has it."""
    for name in _usable(ORDER):
        call = getattr(_module(name), function, None)
        if call is not None:
            call()


@functools.cache
def _usable(order: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in order if why_unavailable(name) is None)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def _function(name: str, op: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_module(name), op)
    return function


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    _log.info("%s: backend %s not used: %s", op, name, reason)
