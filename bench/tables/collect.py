"""What the finished runs say, as one JSON-able dict, and its figures of merit."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ..machine import machine
from .pemn import PAPER, Accuracy
from .runs import Run

KEPT = (
    "test_accuracy",
    "val_accuracy",
    "best_epoch",
    "train_seconds",
    "dataset",
    "chosen_by",
    "model_args",
    "recipe",
    "images",
    "settings",
    "machine",
    "sizes",
)
"""Of a run's result.json."""


def collect(runs: Sequence[Run], root: Path, command: str) -> dict[str, Any]:
    """Everything that page and figure show, from the runs that have ended."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        seeds = cells.setdefault((run.net, run.row), [])
        if result := run.result(root):
            commits = [start["commit"] for start in run.starts(root)]
            facts = {key: result[key] for key in KEPT}
            seeds.append({"seed": run.seed, "commits": commits, **facts})
    return {
        "machine": machine(command),
        "flags": {run.net: list(run.flags) for run in runs},
        "seeds": len({run.seed for run in runs}),
        "cells": [{"net": net, "row": row, "runs": seeds} for (net, row), seeds in cells.items()],
    }


def nets_of(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The cells with a finished run, by net."""
    nets: dict[str, list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["runs"]:
            nets.setdefault(cell["net"], []).append(cell)
    return nets


def ours(cell: dict[str, Any], key: str = "test_accuracy") -> Accuracy:
    """Mean and standard deviation over seeds, in per cent; none of one seed."""
    found = [100 * run[key] for run in cell["runs"]]
    return Accuracy(mean(found), stdev(found) if len(found) > 1 else None)


def paper(cell: dict[str, Any]) -> Accuracy | None:
    """The paper's number, if it has one."""
    return PAPER.get(cell["net"], {}).get(cell["row"])


def formula_size(cell: dict[str, Any]) -> float:
    """Size by the paper's formula, as a fraction of the dense weights: a kept weight of a pruned
    network counts three times, itself and two words of index (section 4.3.1).
    """
    run = cell["runs"][0]
    if "pruning" in (run["recipe"] or {}):
        return 3 * float(run["recipe"]["density"])
    return float(run["sizes"].get("paper_ratio", 1.0))


def file_bytes(cell: dict[str, Any]) -> int:
    """Of the saved file, norms and header included; the mean over seeds."""
    return round(mean(run["sizes"]["file_bytes"] for run in cell["runs"]))


def rank_correlation(cells: Sequence[dict[str, Any]]) -> tuple[float, int] | None:
    """Spearman's, of the mean accuracies of the rows that the paper has too, dense left out, and
    how many they are; None of fewer than three.
    """
    both = [(ours(c).mean, p.mean) for c in cells if c["row"] != "dense" and (p := paper(c))]
    if len(both) < 3:
        return None
    ranks = [_ranks(np.array(side)) for side in zip(*both, strict=True)]
    return float(np.corrcoef(*ranks)[0, 1]), len(both)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
