"""Figures of a result: ``python -m bench.plots bench/results/NAME.json``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .report import OURS, fastest_dense

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",  # the same result, the same file
    "figure.dpi": 120,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
}
KINDS = {
    "prototype, aligned": (1e-4, True),
    "prototype, the paper's period": (1e-2, False),
    "dense weight": (None, False),
}
"""Panels of the figure of linear layers: name to ratio and align."""
Size = tuple[int, int]
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
BAR_COLORS = {OURS: "#228833", "the fastest dense fp32": "#4477aa", "others": "#bbbbbb"}


def linear_figure(cases: list[dict[str, Any]]) -> Figure | None:
    """Times faster than the fastest dense form, by batch, a line for each size of weight."""
    factors: dict[tuple[str, Size], dict[int, float]] = {}  # (kind, size): {batch: factor}
    for case in cases:
        facts = case["facts"]
        if case["group"] != "masked_linear" or facts["layer"] or facts.get("compact"):
            continue
        for kind, settings in KINDS.items():
            if (facts["ratio"], facts["align"]) == settings:
                line = factors.setdefault((kind, (facts["n"], facts["k"])), {})
                line[facts["batch"]] = speed_up(case)
    if not factors:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in factors))
    colors = dict(zip(sorted({size for _, size in factors}), COLORS, strict=False))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(3.4 * len(kinds), 3.4), sharex=True, sharey=True, squeeze=False
    )
    for (kind, size), line in factors.items():
        batches = sorted(line)
        axis = axes[0][kinds.index(kind)]
        axis.plot(batches, [line[b] for b in batches], "o-", color=colors[size], markersize=4)
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.axhline(1, color="0.3", linewidth=1, linestyle="--")
        axis.set_title(kind)
        axis.set_xlabel("batch")
    axes[0][0].set_ylabel("times faster than dense fp32")
    axes[0][0].set_xscale("log", base=2)
    axes[0][0].set_xticks(*_labelled(sorted({b for line in factors.values() for b in line})))
    _speed_up_axis(axes[0][0], [factor for line in factors.values() for factor in line.values()])
    figure.tight_layout()
    figure.legend(
        [Line2D([], [], color=color, marker="o", markersize=4) for color in colors.values()],
        [f"{n} x {k}" for n, k in colors],
        title="weight",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return figure


def network_figure(cases: list[dict[str, Any]]) -> Figure | None:
    """A bar for each provider's time, a panel for each network, ours and the fastest dense form in
    colour.
    """
    shown = [case for case in cases if case["group"] in ("network", "training")]
    shown = [case for case in shown if "part" not in case["facts"]]  # not the single blocks
    if not shown:
        return None
    heights = [len(case["providers"]) + 2 for case in shown]  # in bars, title and axis included
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(7.5, 0.27 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, case in zip(axes[:, 0], shown, strict=True):
        _bars(axis, case)
    figure.tight_layout(h_pad=0.8)
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=color) for color in BAR_COLORS.values()],
        BAR_COLORS,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(BAR_COLORS),
    )
    return figure


FIGURES: dict[str, Callable[[list[dict[str, Any]]], Figure | None]] = {
    "speed_linear.svg": linear_figure,
    "speed_networks.svg": network_figure,
}
"""By file name; None where the result has no such cases."""


def speed_up(case: dict[str, Any]) -> float:
    """Times that ours is faster than the fastest dense form."""
    timings = case["providers"]
    return float(timings[fastest_dense(case)]["median"] / timings[OURS]["median"])


def write(result: dict[str, Any], folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw the figures that the result has cases for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            if (figure := draw(result["cases"])) is None:
                continue
            path = (folder / name).with_suffix(suffix)
            figure.savefig(path, metadata={"Date": None} if suffix == ".svg" else None)
            plt.close(figure)
            written.append(path)
    return written


def _bars(axis: Axes, case: dict[str, Any]) -> None:
    timings = case["providers"]
    ours, fastest = timings[OURS]["median"], fastest_dense(case)
    names = sorted(timings, key=lambda name: timings[name]["median"])
    times = [1e3 * timings[name]["median"] for name in names]
    ours_color, fastest_color, other_color = BAR_COLORS.values()
    colors = [{OURS: ours_color, fastest: fastest_color}.get(name, other_color) for name in names]
    axis.barh(range(len(names)), times, color=colors, height=0.72)
    for place, (name, time) in enumerate(zip(names, times, strict=True)):
        factor = "" if name == OURS else f", {timings[name]['median'] / ours:.2f}x ours"
        axis.text(time, place, f" {time:,.4g} ms{factor}", va="center", fontsize=8.5)
    axis.set_yticks(
        range(len(names)), [f"{n} (lossy)" if timings[n]["lossy"] else n for n in names]
    )
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(times))
    axis.grid(axis="y", visible=False)
    axis.set_title(case["name"])


def _speed_up_axis(axis: Axes, factors: list[float]) -> None:
    ticks = [0.5, 1, 2, 4, 8, 16, 32, 64]
    low, high = min(*factors, 0.9), max(*factors, 1.1)
    axis.set_yscale("log", base=2)
    axis.set_ylim(low / 1.15, high * 1.15)
    axis.set_yticks(*_labelled([t for t in ticks if low / 1.15 <= t <= high * 1.15], "x"))
    axis.minorticks_off()


def _labelled(ticks: list[Any], unit: str = "") -> tuple[list[Any], list[str]]:
    return ticks, [f"{tick:g}{unit}" for tick in ticks]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    for path in write(result, options.folder, ".png" if options.png else ".svg"):
        print(path)


if __name__ == "__main__":
    main()
