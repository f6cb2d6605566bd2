"""Wall-clock timing of several providers side by side."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MINIMUM_SAMPLES = 5
SAMPLE_SECONDS = 1e-3
"""A sample repeats a fast call for about this long, so that the clock's own cost vanishes."""
TURN_SECONDS = 2e-2
"""A provider samples for about this long before the next one's turn."""


@dataclass(frozen=True)
class Task:
    """Calls of ``run`` with the arguments in turn; ``refresh`` as in Provider."""

    run: Callable[[Any], Any]
    arguments: Sequence[Any]
    refresh: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quantiles over ``samples`` samples of ``calls`` calls each."""

    median: float
    q20: float
    q80: float
    samples: int
    calls: int


def interleaved(tasks: dict[str, Task], seconds: float, warm_up: float = 0.1) -> dict[str, Timing]:
    """Time all tasks in turns, so that a change of the machine's speed meets them alike.

    Every task warms up for ``warm_up`` seconds. Then each samples for about ``TURN_SECONDS`` a
    turn until it has had ``seconds`` and ``MINIMUM_SAMPLES`` samples. A turn of short calls begins
    with a sample off the clock: the caches are a task's own in a loop, and here its neighbour's.
    """
    clocks = {name: _Clock(task, warm_up) for name, task in tasks.items()}

    def unfinished(clock: _Clock) -> bool:
        return clock.spent < seconds or len(clock.samples) < MINIMUM_SAMPLES

    while any(map(unfinished, clocks.values())):
        for clock in filter(unfinished, clocks.values()):
            clock.turn()
    return {name: clock.timing() for name, clock in clocks.items()}


class _Clock:
    """The samples of one task, in seconds a call."""

    def __init__(self, task: Task, warm_up: float) -> None:
        self.task = task
        self.samples: list[float] = []
        self.spent = 0.0
        self.calls = 1
        self._next = 0
        count, elapsed = 0, 0.0
        while elapsed < warm_up:
            elapsed += self._sample()
            count += 1
        self._is_short = elapsed / count < TURN_SECONDS
        if task.refresh is None:
            self.calls = max(1, round(SAMPLE_SECONDS * count / elapsed))

    def turn(self) -> None:
        if self._is_short:
            self._sample()
        end = self.spent + TURN_SECONDS
        while self.spent < end:
            elapsed = self._sample()
            self.spent += elapsed
            self.samples.append(elapsed / self.calls)

    def timing(self) -> Timing:
        q20, median, q80 = np.quantile(self.samples, (0.2, 0.5, 0.8))
        return Timing(float(median), float(q20), float(q80), len(self.samples), self.calls)

    def _sample(self) -> float:
        run, arguments, first = self.task.run, self.task.arguments, self._next
        self._next += self.calls
        if self.task.refresh is not None:
            argument = self.task.refresh(arguments[first % len(arguments)])
            start = time.perf_counter()
            run(argument)
            return time.perf_counter() - start
        start = time.perf_counter()
        for index in range(first, first + self.calls):
            run(arguments[index % len(arguments)])
        return time.perf_counter() - start
