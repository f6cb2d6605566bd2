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
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
OURS_COLOR, FASTEST_COLOR, OTHER_COLOR = "#228833", "#4477aa", "#bbbbbb"


def linear_figure(cases: list[dict[str, Any]]) -> Figure | None:
    """Times faster than the fastest dense form, by batch, a line for each size of weight."""
    panels: dict[str, dict[str, dict[int, float]]] = {kind: {} for kind in KINDS}
    for case in cases:
        if case["group"] != "masked_linear" or case["facts"]["layer"]:
            continue
        facts = case["facts"]
        for kind, settings in KINDS.items():
            if (facts["ratio"], facts["align"]) == settings:
                line = panels[kind].setdefault(f"{facts['n']} x {facts['k']}", {})
                line[facts["batch"]] = speed_up(case)
    panels = {kind: lines for kind, lines in panels.items() if lines}
    if not panels:
        return None
    sizes = list(dict.fromkeys(size for lines in panels.values() for size in lines))
    sizes.sort(key=lambda size: [int(side) for side in size.split(" x ")])
    colors = dict(zip(sizes, COLORS, strict=False))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, squeeze=False
    )
    for axis, (kind, lines) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(1, color="0.3", linewidth=1, linestyle="--")
        for size in filter(lines.__contains__, sizes):
            batches = sorted(lines[size])
            factors = [lines[size][batch] for batch in batches]
            axis.plot(batches, factors, "o-", color=colors[size], markersize=4, label=size)
        axis.set_title(kind)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(*_labelled(sorted({b for line in lines.values() for b in line})))
        axis.set_xlabel("batch")
    _speed_up_axis(
        axes[0][0], [f for ls in panels.values() for line in ls.values() for f in line.values()]
    )
    axes[0][0].set_ylabel("times faster than dense fp32")
    handles = {
        text: line
        for axis in axes[0]
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[size] for size in sizes],
        sizes,
        title="weight",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    figure.tight_layout()
    return figure


def network_figure(cases: list[dict[str, Any]]) -> Figure | None:
    """A bar for each provider's time, a panel for each network; ours and the fastest dense stand
    out.
    """
    shown = [case for case in cases if case["group"] in ("network", "training")]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    most = max(len(case["providers"]) for case in shown)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.4 * columns, (0.27 * most + 0.9) * rows), squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, shown, strict=False):
        _bars(axis, case)
    figure.tight_layout(h_pad=1.5)
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
    colors = [{OURS: OURS_COLOR, fastest: FASTEST_COLOR}.get(name, OTHER_COLOR) for name in names]
    axis.barh(range(len(names)), times, color=colors, height=0.72)
    for place, (name, time) in enumerate(zip(names, times, strict=True)):
        factor = "" if name == OURS else f"  {timings[name]['median'] / ours:.2f}x"
        axis.text(time, place, f" {time:.3g} ms{factor}", va="center", fontsize=8.5)
    axis.set_yticks(
        range(len(names)), [f"{n} (lossy)" if timings[n]["lossy"] else n for n in names]
    )
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(times))
    axis.grid(axis="y", visible=False)
    axis.set_title(case["name"])
    axis.set_xlabel("ms")


def _speed_up_axis(axis: Axes, factors: list[float]) -> None:
    ticks = [0.5, 1, 2, 4, 8, 16, 32, 64]
    low, high = min(*factors, 0.9), max(*factors, 1.1)
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
