"""A run's log as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .records import EpochRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Draw loss, accuracy and rate and, of masks, a line per layer and their mean in black: the
    density, the share of bits changed in an epoch, the smallest score kept.
    """
    from matplotlib.figure import Figure

    masked = bool(records[0]["layers"])
    figure = Figure(figsize=(12, 6 if masked else 3), layout="constrained", dpi=120)
    axes = figure.subplots(2 if masked else 1, 3, squeeze=False).flat
    epochs = [record["epoch"] for record in records]
    axes[0].plot(epochs, [r["train_loss"] for r in records], label="train")
    axes[0].plot(epochs, [r["val_loss"] for r in records], label="validation")
    axes[0].set_title("loss")
    axes[1].plot(epochs, [100 * r["train_accuracy"] for r in records], label="train")
    axes[1].plot(epochs, [100 * r["val_accuracy"] for r in records], label="validation")
    axes[1].set_title("accuracy, %")
    axes[1].legend(frameon=False)
    axes[2].plot(epochs, [r["lr"] for r in records])
    axes[2].set_title("learning rate at the end of the epoch")
    if masked:
        _plot_layers(axes[3], records, "density", "density")
        _plot_layers(axes[4], records, "flip_rate", "share of mask bits changed")
        _plot_layers(axes[5], records, "threshold", "smallest score kept")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    figure.savefig(path)


def _plot_layers(
    ax: "Axes",
    records: Sequence[EpochRecord],
    key: Literal["density", "flip_rate", "threshold"],
    title: str,
) -> None:
    epochs = [record["epoch"] for record in records]
    nan = float("nan")  # a gap in the line
    table = [
        [nan if (value := layer[key]) is None else value for layer in record["layers"].values()]
        for record in records
    ]
    for line in zip(*table, strict=True):
        ax.plot(epochs, line, color="tab:green", alpha=0.3, linewidth=0.8)
    ax.plot(epochs, [sum(row) / len(row) for row in table], color="black")
    ax.set_title(title)
