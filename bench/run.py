"""Check, then time, a list of cases; the result is JSON-able (bench/results)."""

import contextlib
import functools
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from .problem import Case, ErrorOf, Problem, Provider
from .timing import Task, interleaved


class WrongResult(Exception):
    """A provider computes something else, so its time means nothing."""


def run(
    cases: Iterable[Case], backend: str, seconds: float, providers: str = ""
) -> Iterator[dict[str, Any]]:
    """One result per case: what it is, and each provider's timing, error and bytes moved.

    Args:
        cases: from ``cases``.
        backend: that ``ours`` runs on.
        seconds: that each provider of a case is timed for.
        providers: a regular expression; only those whose name it finds. ``ours`` always runs.
    """
    for case in cases:
        torch.compiler.reset()  # it stops compiling after some variants of one function
        gc.collect()
        problem = case.build(backend)
        chosen = {
            name: make()
            for name, make in problem.providers.items()
            if name == "ours" or re.search(providers, name)
        }
        with contextlib.nullcontext() if problem.trains else torch.inference_mode():
            errors = check(case.name, problem, chosen)
            tasks = {
                name: Task(p.run, [p.prepare(x) for x in problem.inputs], p.refresh)
                for name, p in chosen.items()
            }
            timings = interleaved(tasks, seconds)
        yield {
            "name": case.name,
            "group": case.group,
            "facts": case.facts(),
            "multiply_adds": problem.multiply_adds,
            "dense": [name for name in problem.dense if name in chosen],
            "providers": {
                name: {
                    **asdict(timings[name]),
                    "error": errors[name],
                    "bound": provider.bound(),
                    "lossy": provider.lossy is not None,
                    "bytes": provider.moved,
                }
                for name, provider in chosen.items()
            },
        }


def check(case: str, problem: Problem, providers: dict[str, Provider]) -> dict[str, float]:
    """The error of each provider on the example; raises WrongResult where one is too large."""
    shared = functools.cache(lambda: problem.judge(problem.example()))
    errors = {name: _error(problem, provider, shared) for name, provider in providers.items()}
    for name, provider in providers.items():
        if not errors[name] <= provider.bound():
            unit = "times the error of plain PyTorch" if provider.lossy is None else "relative"
            raise WrongResult(
                f"{case}: {name} has an error of {errors[name]:.3g} {unit}, "
                f"expected at most {provider.bound()}"
            )
    return errors


def _error(problem: Problem, provider: Provider, shared: Callable[[], ErrorOf]) -> float:
    x = problem.example()
    lossy = provider.lossy is not None
    argument = provider.prepare(x)
    if provider.refresh is None:
        error_of = shared() if provider.judge is None else provider.judge(x)
        return error_of(provider.run(argument), lossy)
    judge = provider.judge or problem.judge
    errors = []
    for _ in range(3):  # what a call leaves behind must not spoil the next
        argument = provider.refresh(argument)
        errors.append(judge(argument)(provider.run(argument), lossy))
    return max(errors)
