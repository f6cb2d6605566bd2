"""Loss and accuracy over epochs, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from .records import EpochRecord


def plot_curves(records: Sequence[EpochRecord], path: Path) -> None:
    """Draw loss, accuracy and, for a masked model, the share of mask bits changed per epoch."""
    from matplotlib.figure import Figure

    epochs = [r["epoch"] for r in records]
    flips = [
        sum(layer["flip_rate"] for layer in r["layers"].values()) / len(r["layers"])
        for r in records
        if r["layers"]
    ]
    panels = 3 if flips else 2
    figure = Figure(figsize=(4 * panels, 3), layout="constrained", dpi=120)
    axes = figure.subplots(1, panels)
    axes[0].plot(epochs, [r["train_loss"] for r in records], label="train")
    axes[0].plot(epochs, [r["val_loss"] for r in records], label="validation")
    axes[0].set(title="loss", xlabel="epoch")
    axes[1].plot(epochs, [100 * r["train_accuracy"] for r in records], label="train")
    axes[1].plot(epochs, [100 * r["val_accuracy"] for r in records], label="validation")
    axes[1].set(title="accuracy, %", xlabel="epoch")
    axes[1].legend(frameon=False)
    if flips:
        axes[2].semilogy(epochs, [100 * flip for flip in flips], color="tab:green")
        axes[2].set(title="mask bits changed, % (mean of layers)", xlabel="epoch")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    figure.savefig(path)
