"""The figure of a result, like PEMN's: accuracy by number of frozen values, and by size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..plots import STYLE
from .collect import formula_size, nets_of, ours, paper
from .pemn import MASK_ROWS

REFERENCE = "mp"
"""The row that differences are taken from: the only one that the paper has of every net."""
KINDS = {"dense": ("s", "#bbbbbb"), "random": ("X", "#ee6677"), "magnitude": ("D", "#ccbb44")}
"""Marker and colour, by the row's first word; all other rows are masks."""
MASKS = ("o", "#228833")
LABELS = {
    "dense": "dense",
    "masks": "masks",
    "random": "random pruning",
    "magnitude": "magnitude pruning",
}

Cells = Sequence[dict[str, Any]]


def draw(result: dict[str, Any]) -> Figure:
    """A column for each net: above, masks in points above or below MP; below, all by size."""
    nets = nets_of(result)
    figure, axes = plt.subplots(
        2, len(nets), figsize=(4.2 * len(nets), 7.2), squeeze=False, sharey="row"
    )
    for column, (net, cells) in enumerate(nets.items()):
        axes[0][column].set_title(net)
        _by_values(axes[0][column], [c for c in cells if c["row"] in MASK_ROWS])
        _by_size(axes[1][column], cells)
    axes[0][0].set_ylabel(f"test accuracy above {REFERENCE}, points")
    axes[1][0].set_ylabel("test accuracy, %")
    handles = [Line2D([], [], marker=m, color=c, linestyle="") for m, c in (MASKS, *KINDS.values())]
    handles.append(Line2D([], [], marker="o", color="0.3", linestyle="", fillstyle="none"))
    names = ("masks", "dense", "random pruning", "magnitude pruning", "the paper's (hollow)")
    figure.tight_layout()
    figure.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
    return figure


def write(result: dict[str, Any], path: Path) -> None:
    """Draw into ``path``, of any format that its suffix names."""
    with plt.rc_context(STYLE):
        figure = draw(result)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _by_values(axis: Axes, cells: Cells) -> None:
    """Masks in the paper's order, fewer frozen values to the right."""
    places = [MASK_ROWS.index(cell["row"]) for cell in cells]
    means = {cell["row"]: ours(cell).mean for cell in cells}
    papers = {cell["row"]: p.mean for cell in cells if (p := paper(cell))}
    marker, color = MASKS
    if REFERENCE in means:
        axis.errorbar(
            places,
            [mean - means[REFERENCE] for mean in means.values()],
            [ours(cell).std or 0 for cell in cells],
            marker=marker,
            color=color,
            capsize=2,
        )
    if REFERENCE in papers:
        axis.plot(
            [MASK_ROWS.index(row) for row in papers],
            [mean - papers[REFERENCE] for mean in papers.values()],
            marker=marker,
            color="0.3",
            fillstyle="none",
            linestyle=":",
        )
    axis.axhline(0, color="0.7", linewidth=1)
    axis.set_xticks(range(len(MASK_ROWS)), MASK_ROWS, rotation=45, ha="right")


def _by_size(axis: Axes, cells: Cells) -> None:
    for cell in cells:
        marker, color = KINDS.get(cell["row"].split("-")[0], MASKS)
        size, found = 100 * formula_size(cell), ours(cell)
        axis.errorbar(size, found.mean, found.std or 0, marker=marker, color=color, capsize=2)
        if printed := paper(cell):
            axis.plot(size, printed.mean, marker=marker, color=color, fillstyle="none")
    axis.set_xscale("log")
    axis.set_xlim(2.7, 130)
    axis.set_xticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"])
    axis.minorticks_off()
    axis.set_xlabel("size by the paper's formula, % of dense")
