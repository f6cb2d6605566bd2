"""``python -m bench tune``: the fit finds the bounds that times were made of, and writes them."""

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import tune
from masked_kernels.backends import backends
from masked_kernels.backends.cpu.plan import Bounds, row_patterns

SHAPES = ((1024, 512), (1024, 2048))


def times_of(bounds: Bounds) -> tune.Times:
    """Times in which the choice of ``bounds`` is always twice as fast as every other plan."""
    times: tune.Times = {}
    for point in tune.grid(SHAPES):
        chosen = point.decide(bounds).plan
        plans = ["direct", "panels"]
        if not point.compact and row_patterns(point.cols, point.period) is not None:
            plans.append("aligned")
        times[point] = {plan: 1.0 if plan == chosen else 2.0 for plan in plans}
    return times


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(),
        Bounds((16, 256), (128, 32, 8, 16)),
        Bounds((None, 64), (8, 16, 0, 4)),
        Bounds((512, None), (8, 128, 2, 0)),
    ],
)
def test_fit_recovers_the_bounds(bounds: Bounds) -> None:
    times = times_of(bounds)
    fitted = tune.fit(times)
    assert tune.cost(fitted, times) == tune.cost(bounds, times) == 0.0
    assert tune.cost(Bounds((8, 8), (1024, 1024, 1024, 1024)), times) > 0.0
    assert fitted == bounds


def test_grid_has_every_kind_of_weight() -> None:
    points = list(tune.grid(((512, 512),), (1,)))
    assert [point.compact for point in points] == 9 * [False] + [True]
    patterns = [row_patterns(point.cols, point.period) for point in points[:-1]]
    assert patterns == [64, 32, 16, 8, 4, 2, 1, None, 512]
    assert len(set(points)) == len(points)
    assert [2 * point.period > point.rows * point.cols for point in points].count(True) == 1


def test_tune_writes_the_bounds_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := backends()["cpu"]:
        pytest.skip(f"backend 'cpu' is unavailable: {reason}")
    small = [*tune.grid(((32, 64),), (1, 4))][::-3]
    assert [point.compact for point in small] == [True, False, False, False]
    monkeypatch.setattr(tune, "grid", lambda: small)
    out = tmp_path / "plans.json"
    other = {"aligned_rows": [1, 2], "direct_tokens": [3, 4, 5, 6]}
    out.write_text(json.dumps({"other": other}))
    threads = torch.get_num_threads()
    try:
        flags = ["--threads", "1", "--seconds", "0.001", "--out", str(out)]
        assert command.main(["tune", *flags]) == 0
    finally:
        torch.set_num_threads(threads)
    table = json.loads(out.read_text())
    assert table.pop("other") == other
    ((isa, fields),) = table.items()
    assert f"{isa}: {Bounds(*map(tuple, fields.values()))}" in capsys.readouterr().out
