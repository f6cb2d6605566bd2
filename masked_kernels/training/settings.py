"""How to train: everything that, with the model and the data, decides what comes out."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

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

OPTIMIZERS = ("adamw", "adam", "sgd")

AMP_DTYPES: dict[str, torch.dtype | None] = {
    "off": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

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
        accumulate: pieces in which a batch goes through the model, for less memory. In exact
            arithmetic the gradient is that of the whole batch, unless the model has BatchNorm,
            which takes mean and variance of each piece.
        amp: ``fp16`` (with loss scaling) or ``bf16`` runs the forward under autocast; ``off``.
        channels_last: images, and weights of plain convolutions, in that memory format.
        compile: run the model through ``torch.compile`` in training.
        cuda_graphs: capture a step's forward and backward as a CUDA graph and replay it; on one
            CUDA device, without ``compile``.
        recompute_norms: keep less for the backward (``nn.recompute_norms``).
        seed: of the data order and augmentations (the model's own seed is its maker's).
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.01
    weight_decay: float = 0.005
    optimizer: str = "adamw"
    momentum: float = 0.9
    schedule: str = "triangular"
    augment: Transform = NO_AUGMENTATION
    erase: Transform = NO_AUGMENTATION
    clip_norm: float | None = None
    accumulate: int = 1
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    recompute_norms: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", tuple(SCHEDULES)),
            ("amp", tuple(AMP_DTYPES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: got {self.clip_norm}, expected more than 0, or None")
        if self.compile and self.cuda_graphs:
            raise ValueError("cuda_graphs: got compile as well, expected one of the two")

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, the transforms as their ``repr``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"augment": repr(self.augment), "erase": repr(self.erase)}
