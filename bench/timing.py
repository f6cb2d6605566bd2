"""Wall-clock timing of several providers side by side."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MINIMUM_SAMPLES = 5
SAMPLE_SECONDS = 1e-3
"""A sample repeats a fast call for about this long, so that the clock's own cost vanishes."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quantiles over ``samples`` samples of ``calls`` calls each."""

    median: float
    q20: float
    q80: float
    samples: int
    calls: int


def interleaved(
    providers: dict[str, Callable[[Any], Any]],
    inputs: Sequence[Any],
    seconds: float,
    warm_up: float = 0.1,
) -> dict[str, Timing]:
    """Time all providers in turns, so that a change of the machine's speed meets them alike.

    Every provider warms up for ``warm_up`` seconds. Then they take samples in rounds until each
    has had about ``seconds`` and ``MINIMUM_SAMPLES`` samples. Inputs rotate from call to call.
    """
    calls = {name: _warm_up(run, inputs, warm_up) for name, run in providers.items()}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    spent = dict.fromkeys(providers, 0.0)

    def unfinished(name: str) -> bool:
        return spent[name] < seconds or len(samples[name]) < MINIMUM_SAMPLES

    while any(map(unfinished, providers)):
        for name in filter(unfinished, providers):
            elapsed = _sample(providers[name], inputs, calls[name], first=len(samples[name]))
            spent[name] += elapsed
            samples[name].append(elapsed / calls[name])
    return {name: _timing(samples[name], calls[name]) for name in providers}


def _sample(run: Callable[[Any], Any], inputs: Sequence[Any], calls: int, first: int) -> float:
    start = time.perf_counter()
    for index in range(first, first + calls):
        run(inputs[index % len(inputs)])
    return time.perf_counter() - start


def _warm_up(run: Callable[[Any], Any], inputs: Sequence[Any], seconds: float) -> int:
    """Calls that make up a sample."""
    start = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        run(inputs[count % len(inputs)])
        count += 1
    return max(1, round(SAMPLE_SECONDS * count / elapsed))


def _timing(samples: list[float], calls: int) -> Timing:
    q20, median, q80 = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(float(median), float(q20), float(q80), len(samples), calls)
