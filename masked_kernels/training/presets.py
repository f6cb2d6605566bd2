"""How to train: settings, and the papers' settings under a name."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from .augment import (
    ColorJitter,
    Compose,
    HorizontalFlip,
    RandomCrop,
    RandomErasing,
    Transform,
)
from .randaugment import RandAugment
from .schedules import SCHEDULES

NO_AUGMENTATION = Compose(())


@dataclass(frozen=True)
class Settings:
    """Everything that, with the model and the data, decides how training goes.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: the largest learning rate of the schedule.
        weight_decay: of every trained parameter, scores and norms alike.
        optimizer: adamw, adam, or sgd with ``momentum``.
        schedule: a key of ``SCHEDULES``.
        augment: applied to uint8 training images.
        erase: applied after normalisation.
        clip_norm: largest norm of the gradient; None does not clip.
        half: on CUDA, run the forward in float16 with loss scaling; elsewhere it does nothing.
        seed: of the data order and augmentations (the model's own seed is its maker's).
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.01
    weight_decay: float = 0.005
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.9
    schedule: str = "triangular"
    augment: Transform = NO_AUGMENTATION
    erase: Transform = NO_AUGMENTATION
    clip_norm: float | None = None
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, the transforms as their ``repr``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"augment": repr(self.augment), "erase": repr(self.erase)}


@dataclass(frozen=True)
class Preset:
    """A model's arguments and its training settings for one kind of data."""

    model: str
    datasets: tuple[str, ...]
    settings: Settings
    model_args: dict[str, int] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    # PEMN supplement A and the authors' README: ConvMixer on CIFAR-10, 100 epochs.
    "convmixer-paper": Preset(
        model="convmixer",
        datasets=("cifar10",),
        model_args={"dim": 256, "depth": 8, "kernel_size": 5, "patch_size": 2},
        settings=Settings(
            epochs=100,
            batch_size=512,
            lr=0.05,
            weight_decay=0.005,
            augment=Compose((HorizontalFlip(), RandAugment(2, 12), ColorJitter(0.2, 0.2, 0.2))),
            erase=RandomErasing(0.2),
            half=True,
        ),
    ),
    # The paper's optimizer for minutes on a CPU: a smaller model, fewer epochs, cheaper images.
    "convmixer-small": Preset(
        model="convmixer",
        datasets=("cifar10",),
        model_args={"dim": 96, "depth": 4, "kernel_size": 5, "patch_size": 4},
        settings=Settings(
            epochs=10,
            batch_size=64,
            lr=0.02,
            augment=Compose((HorizontalFlip(), RandomCrop(4))),
        ),
    ),
    # Handwritten digits know left from right: shifted by a pixel, never mirrored.
    "convmixer-digits": Preset(
        model="convmixer",
        datasets=("digits",),
        model_args={"dim": 256, "depth": 4, "kernel_size": 3, "patch_size": 2},
        settings=Settings(epochs=15, batch_size=64, lr=0.02, augment=RandomCrop(1)),
    ),
    "convmixer-28": Preset(
        model="convmixer",
        datasets=("mnist", "fashion_mnist"),
        model_args={"dim": 96, "depth": 4, "kernel_size": 5, "patch_size": 4},
        settings=Settings(epochs=5, batch_size=128, lr=0.02, augment=RandomCrop(2)),
    ),
}


def find_preset(model: str, dataset: str) -> str:
    """Return the name of the first preset for this model and dataset.

    Raises:
        ValueError: there is none.
    """
    names = [n for n, p in PRESETS.items() if p.model == model and dataset in p.datasets]
    if not names:
        raise ValueError(f"no preset for {model} on {dataset}; give one of {', '.join(PRESETS)}")
    return names[0]
