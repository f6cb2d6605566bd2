"""How to train: everything that, with the model and the data, decides what comes out."""

import dataclasses
from dataclasses import dataclass
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

AUGMENTATIONS: dict[str, tuple[Transform, Transform]] = {
    "none": (NO_AUGMENTATION, NO_AUGMENTATION),
    "crop-flip": (Compose((RandomCrop(4), HorizontalFlip())), NO_AUGMENTATION),
    # PEMN supplement A and the authors' README. Their random resized crop has scale and ratio 1.
    "convmixer": (
        Compose((HorizontalFlip(), RandAugment(2, 12), ColorJitter(0.2, 0.2, 0.2))),
        RandomErasing(0.2),
    ),
    # What the public ViT code that PEMN's numbers agree with does; PEMN's own was not released.
    "vit": (Compose((RandAugment(2, 14), RandomCrop(4), HorizontalFlip())), NO_AUGMENTATION),
}
"""By name, ``augment`` and ``erase`` of `Settings`."""


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
