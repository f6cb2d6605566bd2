"""``python -m bench tune --backend triton``: measure the settings of this machine's GPU.

Tiles and bounds of ``masked_linear`` become those whose choices take the least time over a grid of
problems, in geometric mean. They are written under the name of the GPU into ``gpus.json`` of the
backend, which only ever reads it.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import why_unavailable

from .machine import machine

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((1024, 1024), (4096, 4096))
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
FUSED_COLS = (128, 256, 512, 1024)
NEVER = 1 << 30

_FEW = ((32, 16, 128, 4, 3), (64, 16, 128, 4, 3), (128, 16, 128, 4, 3), (32, 16, 256, 4, 2))
_SOME = ((64, 64, 64, 4, 3), (64, 64, 128, 4, 3), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3))
_MANY = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 32, 8, 4), (64, 128, 32, 4, 3))


class Problem(NamedTuple):
    """``tokens`` inputs times a masked ``[rows, cols]``, alone or with what a fused convolution
    does after.
    """

    tokens: int
    rows: int
    cols: int
    period: int
    dtype: torch.dtype
    fused: bool


class Choice(NamedTuple):
    """A plan of ``config.linear_plan``, and a tile if it has one to choose."""

    plan: str
    tile: Any


Timer = Callable[[Problem, Choice], float]
"""Seconds that a problem takes in a way to solve it."""


def grid() -> list[Problem]:
    """Aligned and other prototypes for all batches, and fused to narrow pointwise convolutions."""
    problems = []
    for dtype in DTYPES:
        for rows, cols in SHAPES:
            for period in (cols, mk.prototype_period(rows * cols, 1e-2)):
                problems += [Problem(n, rows, cols, period, dtype, False) for n in TOKENS]
        problems += [Problem(1 << 15, 256, cols, 66, dtype, True) for cols in FUSED_COLS]
    return problems


def candidates() -> dict[str, list[Any]]:
    """Values to try for each field of ``Settings``."""
    from masked_kernels.backends.triton.config import Tile

    few, some, many = ([Tile(*each) for each in tiles] for tiles in (_FEW, _SOME, _MANY))
    bounds = [16, *(n for n in TOKENS if n > 16), NEVER]
    return {
        "fewest": [dataclasses.replace(tile, tokens=8) for tile in few],
        "few": few,
        "some": some,
        "many": many,
        "many_float32": many,
        "planes_slots": [0, 3, 12, 16, 32, 64],
        "many_tokens": [(a, b) for a in bounds for b in bounds],
        "fused_cols": [0, *FUSED_COLS],
    }


def chosen(problem: Problem, settings: Any) -> Choice:
    """What the backend does about the problem."""
    from masked_kernels.backends.triton import config

    tokens, rows, _, _, dtype, _ = problem
    plan = config.linear_plan(*problem, settings)
    return Choice(
        plan, config.linear_tile(tokens, rows, dtype, settings) if plan == "tiles" else None
    )


def forced(choice: Choice) -> Any:
    """Settings with which any problem is solved by a choice, where it can be."""
    from masked_kernels.backends.triton.config import Settings

    tiles = {}
    if choice.tile is not None:
        tiles = dict.fromkeys(("fewest", "few", "some", "many", "many_float32"), choice.tile)
    bound = 0 if choice.plan == "library" else NEVER
    return Settings(64 if choice.plan == "planes" else 0, (bound, bound), 0, **tiles)


def fit(problems: Iterable[Problem], timer: Timer, start: Any) -> Any:
    """The settings of least ``cost``, one field improved after the other until none can be."""
    problems, times = list(problems), dict[tuple[Problem, Choice], float]()

    def time(problem: Problem, choice: Choice) -> float:
        if (problem, choice) not in times:
            times[problem, choice] = timer(problem, choice)
        return times[problem, choice]

    def cost(settings: Any) -> float:
        return sum(math.log(time(problem, chosen(problem, settings))) for problem in problems)

    best = start
    while True:
        better = best
        for field, values in candidates().items():
            tried = [dataclasses.replace(better, **{field: value}) for value in values]
            better = min((better, *tried), key=cost)
        if better == best:
            return best
        best = better


def time_on_gpu(problem: Problem, choice: Choice) -> float:
    """Seconds of a call, or infinitely many where the tile does not fit the device."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    from masked_kernels.backends.triton.settings import use_settings

    tokens, rows, cols, period, dtype, fused = problem
    x = torch.randn(1, cols, 1, tokens, device="cuda").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    values = torch.randn(period, device="cuda").to(dtype)
    words = torch.randint(-(2**31), 2**31 - 1, (rows, cols // 32), device="cuda").int()
    affine = torch.randn(4, rows, device="cuda").to(dtype)
    point = ([1, 1], [1, 1], [0, 0], [1, 1], 1)

    def call() -> object:
        if fused:
            return _ops.masked_conv2d_fused(
                x, values, words, affine, "gelu", None, *point, "triton"
            )
        return _ops.masked_linear(x[0, :, 0].t(), values, words, None, None, "triton")

    with use_settings(forced(choice)):
        try:
            return 1e-3 * float(do_bench(call, return_mode="median"))
        except OutOfResources:
            return math.inf


def write(name: str, settings: Any, facts: dict[str, Any], path: Path) -> None:
    """Set the settings of a GPU; those of others stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[name] = {"source": "measured", **facts, **dataclasses.asdict(settings)}
    lines = (f" {json.dumps(key)}: {json.dumps(each)}" for key, each in table.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def tune(out: Path | None, timer: Timer = time_on_gpu) -> int:
    """Measure, fit, write; exit code 1 without a GPU."""
    if reason := why_unavailable("triton"):
        print(f"error: backend 'triton' is unavailable: {reason}", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("error: no CUDA device, and the interpreter has nothing to time", file=sys.stderr)
        return 1
    from masked_kernels.backends.triton.settings import GPUS, settings_of

    settings = fit(grid(), timer, settings_of(torch.empty(0, device="cuda")))
    facts = machine("python -m bench tune --backend triton")
    name = torch.cuda.get_device_name()
    print(f"{name}: {settings}")
    write(name, settings, {key: facts[key] for key in ("commit", "date", "torch")}, out or GPUS)
    return 0
