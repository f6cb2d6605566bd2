"""PEMN's nets, rows and numbers (Bai et al., "Parameter-Efficient Masking Networks", supplement
tables 1, 2, 5 and 6; dense nets and ConvMixer's pruned ones from the figures), and our schedules.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MASK_ROWS = ("mask", "one-layer", "mp", *(f"rp-1e-{n}" for n in range(1, 6)))
PRUNED_ROWS = tuple(
    f"{kind}-{size}" for kind in ("random", "magnitude") for size in range(90, 98, 2)
)
ROWS = ("dense", *MASK_ROWS, *PRUNED_ROWS)
"""Those of the paper's tables; the pruned ones name the per cent of storage that is saved."""
RATE_ROWS = tuple(f"{row}-rate" for row in PRUNED_ROWS)
"""Pruned too, but the number is the per cent of weights removed."""

CPU_NETS = ("convmixer-6-256", "resnet-32", "vit-6-256")


@dataclass(frozen=True)
class Accuracy:
    """Per cent of CIFAR-10's test images; ``std`` over 3 repeats, None where none is printed."""

    mean: float
    std: float | None = None


def _read() -> dict[str, dict[str, Accuracy]]:
    text = Path(__file__).with_name("pemn.json").read_text()
    return {
        net: {row: Accuracy(*numbers) for row, numbers in rows.items()}
        for net, rows in json.loads(text).items()
    }


PAPER = _read()
"""Net to row to what the paper reports: the best test accuracy of any epoch."""

_SUBSET = (
    *("--limit-train", "4000", "--val-size", "1000", "--limit-test", "3000"),
    *("--batch-size", "64", "--augment", "crop-flip", "--channels-last"),
)
SCHEDULES: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": dict.fromkeys(PAPER, ()),
    # Two minutes a run on one core: patches twice as long, so that four times as many are seen.
    "cpu": {
        "convmixer-6-256": (
            *_SUBSET,
            *("--epochs", "6", "--lr", "0.02", "--model-args", "patch_size=4"),
        ),
        "resnet-32": (*_SUBSET, "--epochs", "3", "--lr", "0.1"),
        "vit-6-256": (
            *_SUBSET,
            *("--epochs", "3", "--lr", "0.003", "--schedule", "triangular"),
            *("--model-args", "patch_size=8"),
        ),
    },
}
"""Name to net to the flags of examples/train.py; without any, the preset's schedule is the
paper's.
"""
