"""What the examples share: data, augmentation, schedules, presets and the training loop.

Needs the extra ``examples`` (tqdm, matplotlib; scikit-learn for digits, Pillow for CIFAR-10's PNG
sheets). ``import masked_kernels`` does not import it.
"""

from .augment import Normalize
from .data import ImageDataset, Splits, batches, load_splits, seeded_generator, stratified_order
from .evaluation import Score, evaluate, predict
from .loop import fit
from .presets import NETS, PRESETS, ROWS, Net, Preset, Row, find_net
from .records import EpochRecord, best_record
from .settings import AUGMENTATIONS, Settings
from .sources import SOURCES
from .world import World

__all__ = [
    "AUGMENTATIONS",
    "NETS",
    "PRESETS",
    "ROWS",
    "SOURCES",
    "EpochRecord",
    "ImageDataset",
    "Net",
    "Normalize",
    "Preset",
    "Row",
    "Score",
    "Settings",
    "Splits",
    "World",
    "batches",
    "best_record",
    "evaluate",
    "find_net",
    "fit",
    "load_splits",
    "predict",
    "seeded_generator",
    "stratified_order",
]
