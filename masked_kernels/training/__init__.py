"""What the examples share: data, augmentation, schedules, presets and the training loop.

Needs the extra ``examples`` (tqdm, matplotlib; scikit-learn for digits, Pillow for CIFAR-10's PNG
sheets). ``import masked_kernels`` does not import it.
"""

from .augment import Normalize
from .data import ImageDataset, Splits, batches, load_splits, seeded_generator, stratified_order
from .loop import Score, evaluate, fit, predict
from .presets import PRESETS, Preset, Settings, find_preset
from .records import EpochRecord, best_record
from .sources import SOURCES

__all__ = [
    "PRESETS",
    "SOURCES",
    "EpochRecord",
    "ImageDataset",
    "Normalize",
    "Preset",
    "Score",
    "Settings",
    "Splits",
    "batches",
    "best_record",
    "evaluate",
    "find_preset",
    "fit",
    "load_splits",
    "predict",
    "seeded_generator",
    "stratified_order",
]
