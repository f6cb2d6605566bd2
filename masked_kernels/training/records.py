"""What is recorded of an epoch, masks included."""

from collections.abc import Sequence
from typing import TypedDict

from torch import nn

from ..mask import PackedMask
from ..nn import MaskedConv2d, MaskedLinear


class LayerStats(TypedDict):
    """One masked layer after an epoch: fraction kept, and fraction of bits changed in the epoch."""

    density: float
    flip_rate: float


class EpochRecord(TypedDict):
    """One line of ``log.jsonl``. Training figures are means over the epoch, augmented images."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    images_per_second: float
    layers: dict[str, LayerStats]


def best_record(records: Sequence[EpochRecord]) -> EpochRecord:
    """Return the first record of the highest validation accuracy; of equals, the lowest loss."""
    return max(records, key=lambda record: (record["val_accuracy"], -record["val_loss"]))


def current_masks(model: nn.Module) -> dict[str, PackedMask]:
    """Return the mask of every trainable masked layer, by module name."""
    return {
        name: module.mask
        for name, module in model.named_modules()
        if isinstance(module, MaskedLinear | MaskedConv2d)
    }


def layer_stats(
    before: dict[str, PackedMask], after: dict[str, PackedMask]
) -> dict[str, LayerStats]:
    """Compare the masks of one model at two times."""
    return {
        name: {"density": mask.density(), "flip_rate": (mask ^ before[name]).density()}
        for name, mask in after.items()
    }
