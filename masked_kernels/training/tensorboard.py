"""The log of a run for TensorBoard; needs the extra ``tensorboard``."""

from pathlib import Path

from .records import EpochRecord


class TensorBoard:
    """Event files in a folder. A layer's statistics are in groups of their own.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, epochs_done: int) -> None:
        """``epochs_done``: what an earlier process wrote of later epochs is not shown."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard logs need the package tensorboard: "
                "pip install 'masked-kernels[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)

    def add(self, record: EpochRecord) -> None:
        """Write an epoch's figures at once."""
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["epoch"])
        self.writer.flush()


def scalars(record: EpochRecord) -> dict[str, float]:
    """Return the figures of a record by tag: ``loss/train``, ``flip_rate/head`` and so on."""
    flat: dict[str, float] = {
        "loss/train": record["train_loss"],
        "loss/validation": record["val_loss"],
        "accuracy/train": record["train_accuracy"],
        "accuracy/validation": record["val_accuracy"],
        "lr": record["lr"],
        "speed/images_per_second": record["images_per_second"],
        "speed/step_seconds": record["step_seconds"],
        "memory/peak_bytes": record["peak_memory_bytes"],
    }
    for layer, stats in record["layers"].items():
        for key, value in stats.items():
            if isinstance(value, float):
                flat[f"{key}/{layer}"] = value
    return flat
