"""Check, then time, a list of cases; the result is JSON-able (bench/results)."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from .registry import Case
from .timing import interleaved

LARGEST_ERROR = 2.0
"""A provider's error may be at most this many times that of plain PyTorch in the same dtype."""


class WrongResult(Exception):
    """A provider computes something else, so its time means nothing."""


def run(cases: Iterable[Case], backend: str, seconds: float) -> Iterator[dict[str, Any]]:
    """One result per case: name, baseline, and for each provider its Timing's fields and error.

    Args:
        cases: from ``registry``.
        backend: that ``ours`` runs on.
        seconds: that each provider of a case is timed for.
    """
    for case in cases:
        problem = case.build(backend)
        with torch.inference_mode():
            x = problem.inputs[0]
            errors = {name: problem.error(f(x), x) for name, f in problem.providers.items()}
            for name, error in errors.items():
                if not error <= LARGEST_ERROR:
                    raise WrongResult(
                        f"{case.name}: {name} has {error:.3g} times the error of plain PyTorch, "
                        f"expected at most {LARGEST_ERROR}"
                    )
            timings = interleaved(problem.providers, problem.inputs, seconds)
        providers = {name: {**asdict(t), "error": errors[name]} for name, t in timings.items()}
        yield {"name": case.name, "baseline": problem.baseline, "providers": providers}
