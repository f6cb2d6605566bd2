"""Pruning: which weights of a plain model to keep, and training those alone."""

from .magnitude import magnitude
from .masks import SCOPES, Layers, Method, prune_masks
from .model import METHODS, prune_model_
from .random import random
from .size import SAVINGS, density_at_saving

__all__ = [
    "METHODS",
    "SAVINGS",
    "SCOPES",
    "Layers",
    "Method",
    "density_at_saving",
    "magnitude",
    "prune_masks",
    "prune_model_",
    "random",
]
