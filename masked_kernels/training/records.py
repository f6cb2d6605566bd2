"""What is recorded of an epoch, masks included."""

from collections.abc import Sequence
from typing import TypedDict

from torch import nn

from ..mask import PackedMask
from ..nn import MaskedConv2d, MaskedLinear


class LayerStats(TypedDict):
    """One masked layer after an epoch.

    ``density`` is the fraction kept; ``flip_rate`` the fraction of bits changed in the epoch;
    ``threshold`` the smallest key kept: |score| where the rule ranks that, else score. It is None
    where nothing is kept.
    """

    density: float
    flip_rate: float
    threshold: float | None


class EpochRecord(TypedDict):
    """One line of ``log.jsonl``.

    Training figures are means over the epoch, augmented images. ``seconds``, of which
    ``step_seconds`` is the mean of a step, are of training alone, without validation.
    ``peak_memory_bytes`` is `peak_memory`'s.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    step_seconds: float
    images_per_second: float
    peak_memory_bytes: int
    layers: dict[str, LayerStats]


def best_record(records: Sequence[EpochRecord]) -> EpochRecord:
    """Return the first record of the highest validation accuracy; of equals, the lowest loss."""
    return max(records, key=lambda record: (record["val_accuracy"], -record["val_loss"]))


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear | MaskedConv2d]:
    """Return every layer that trains a mask, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MaskedLinear | MaskedConv2d)
    }


def current_masks(model: nn.Module) -> dict[str, PackedMask]:
    """Return the mask of every layer that trains one, by module name."""
    return {name: layer.mask for name, layer in masked_layers(model).items()}


def layer_stats(model: nn.Module, before: dict[str, PackedMask]) -> dict[str, LayerStats]:
    """Say what the masks are now, and how they differ from those of an earlier time."""
    stats: dict[str, LayerStats] = {}
    for name, layer in masked_layers(model).items():
        mask, scores = layer.mask, layer.scores.detach()
        kept = (scores.abs() if layer.rule.absolute else scores)[mask.unpack()]
        stats[name] = {
            "density": mask.density(),
            "flip_rate": (mask ^ before[name]).density(),
            "threshold": kept.min().item() if len(kept) else None,
        }
    return stats
