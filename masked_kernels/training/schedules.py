"""Learning rates as pure functions of the fractional epoch.

A schedule takes ``(epoch, epochs, lr)``: how far training is, ``0 <= epoch <= epochs`` (2.5 is
halfway through the third epoch), how long it will be, and the largest rate. It returns the rate
to use. No state, so a resumed run continues on the same curve by construction.
"""

import math
from collections.abc import Callable

import numpy as np

Schedule = Callable[[float, int, float], float]


def triangular(epoch: float, epochs: int, lr: float) -> float:
    """Rise linearly from 0 to ``lr`` at 2/5, fall to ``lr / 20`` at 4/5 and to 0 at the end.

    PEMN's ConvMixer schedule. Its released code rounds the knots to whole epochs; the two agree
    whenever 5 divides ``epochs``, as it does for the paper's 100.
    """
    knots = (0.0, 0.4 * epochs, 0.8 * epochs, float(epochs))
    return float(np.interp(epoch, knots, (0.0, lr, lr / 20, 0.0)))


def cosine(epoch: float, epochs: int, lr: float) -> float:
    """Fall from ``lr`` to 0 along half a cosine (PEMN supplement A: its ViT and ResNet)."""
    return lr * 0.5 * (1 + math.cos(math.pi * min(max(epoch / epochs, 0.0), 1.0)))


def constant(epoch: float, epochs: int, lr: float) -> float:
    """Stay at ``lr``."""
    return lr


SCHEDULES: dict[str, Schedule] = {
    "triangular": triangular,
    "cosine": cosine,
    "constant": constant,
}
