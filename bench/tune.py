"""``python -m bench tune``: time every plan of ``masked_linear`` and of ``compact_linear`` and fit
the bounds between them.

The bounds of this machine's instruction set in ``masked_kernels/backends/cpu/plans.json`` become
those whose choices take the least time over the grid, in geometric mean. ``--backend triton`` does
the like for the GPU of this machine, see ``tune_triton``.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import masked_kernels as mk
from masked_kernels.backends import why_unavailable
from masked_kernels.backends.cpu._native import isa
from masked_kernels.backends.cpu.compact import COMPACT
from masked_kernels.backends.cpu.linear import LINEAR
from masked_kernels.backends.cpu.plan import (
    PLANS,
    Bounds,
    Decision,
    bounds_of,
    linear_decision,
    row_patterns,
)

from . import tune_triton
from .cases._weights import masked_weight
from .timing import Task, interleaved

SHAPES = ((256, 256), (512, 512), (1024, 1024), (1024, 4096), (4096, 1024), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
ROWS_PER_PATTERN = (8, 16, 32, 64, 128, 256, 512, 1024)
UNALIGNED_RATIO = 1e-2


@dataclasses.dataclass(frozen=True)
class Point:
    """A problem of the grid, in the words of ``linear_decision``."""

    tokens: int
    rows: int
    cols: int
    period: int
    compact: bool = False

    def decide(self, bounds: Bounds) -> Decision:
        return linear_decision(*dataclasses.astuple(self)[:4], torch.float32, bounds, self.compact)


Times = dict[Point, dict[str, float]]
"""Seconds of each plan that can run the point."""


def grid(
    shapes: Iterable[tuple[int, int]] = SHAPES, tokens: Iterable[int] = TOKENS
) -> Iterator[Point]:
    """For each shape the aligned periods, one that is not, a dense weight, and half of that; for
    each batch.
    """
    for rows, cols in shapes:
        periods = [cols * (rows // each) for each in ROWS_PER_PATTERN if each < rows] + [cols]
        periods += [mk.prototype_period(rows * cols, UNALIGNED_RATIO), rows * cols]
        for period in periods:
            for batch in tokens:
                yield Point(batch, rows, cols, period)
        for batch in tokens:
            yield Point(batch, rows, cols, rows * cols // 2, compact=True)


def measure(points: Iterable[Point], seconds: float) -> Times:
    """Time the plans of each point side by side, each for ``seconds``."""
    times: Times = {}
    for point in points:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(point.tokens, point.cols, generator=generator)
        mask = masked_weight((point.rows, point.cols), None, False).mask
        plans = COMPACT if point.compact else LINEAR
        count = mask.count() if point.compact else point.period
        values = torch.randn(count, generator=generator)
        tasks = {
            plan: Task(
                functools.partial(run, values=values, words=mask.words, bias=None, scale=None), (x,)
            )
            for plan, run in plans.items()
            if plan != "aligned" or row_patterns(point.cols, point.period) is not None
        }
        timed = interleaved(tasks, seconds, warm_up=seconds)
        times[point] = {plan: timing.median for plan, timing in timed.items()}
    return times


def fit(times: Times) -> Bounds:
    """The Bounds of least ``cost``, one bound improved after the other until none can be."""
    rows = (None, *ROWS_PER_PATTERN)
    tokens = (0, *sorted({point.tokens for point in times}))
    best = Bounds()
    while True:
        better = best
        for name, place in itertools.product(("aligned_rows", "direct_tokens"), range(4)):
            bounds = getattr(better, name)
            if place >= len(bounds):
                continue
            candidates = (
                dataclasses.replace(better, **{name: _with(bounds, place, value)})
                for value in (rows if name == "aligned_rows" else tokens)
            )
            better = min((better, *candidates), key=lambda bounds: cost(bounds, times))
        if better == best:
            return best
        best = better


def cost(bounds: Bounds, times: Times) -> float:
    """Mean log of the chosen plan's time over that of the point's fastest: 0 if always right."""
    losses = []
    for point, seconds in times.items():
        plan = point.decide(bounds).plan
        losses.append(math.log(seconds[plan] / min(seconds.values())))
    return sum(losses) / len(losses)


def _with(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def write(isa: str, bounds: Bounds, path: Path) -> None:
    """Set the bounds of ``isa``; those of other instruction sets stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[isa] = dataclasses.asdict(bounds)
    lines = (f" {json.dumps(name)}: {json.dumps(each)}" for name, each in table.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    """Measure, fit, write; prints where the fitted choice is not the fastest."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of torch and of our kernels")
    parser.add_argument("--seconds", type=float, default=0.03, help="to time each plan for")
    parser.add_argument("--out", type=Path, help="default: the file that the package ships")
    parser.add_argument("--backend", choices=("cpu", "triton"), default="cpu")
    options = parser.parse_args(arguments)
    if options.backend == "triton":
        return tune_triton.tune(options.out)
    if reason := why_unavailable("cpu"):
        print(f"error: backend 'cpu' is unavailable: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    points = list(grid())
    times: Times = {}
    for index, point in enumerate(points, 1):
        times |= measure([point], options.seconds)
        if index % 50 == 0:
            print(f"{index}/{len(points)}", file=sys.stderr, flush=True)
    bounds = fit(times)
    for point, seconds in times.items():
        plan = point.decide(bounds).plan
        fastest = min(seconds, key=seconds.__getitem__)
        if seconds[plan] > 1.1 * seconds[fastest]:
            print(f"{point}: {plan} takes {seconds[plan] / seconds[fastest]:.2f}x of {fastest}")
    old, new = (math.exp(cost(each, times)) for each in (bounds_of(isa()), bounds))
    print(f"{isa()}: {bounds}; {new:.3f}x of the fastest plans' time, before {old:.3f}x")
    write(isa(), bounds, options.out or PLANS)
    return 0
