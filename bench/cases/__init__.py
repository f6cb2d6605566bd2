"""All cases, the short form's, the toys of the tests, and the README's choice."""

from ..problem import Case
from . import conv2d, linear, network, select, training

CASES: tuple[Case, ...] = (
    *select.CASES,
    *linear.CASES,
    *conv2d.CASES,
    *network.CASES,
    *training.CASES,
)

QUICK: tuple[Case, ...] = (
    *select.QUICK,
    *linear.QUICK,
    *conv2d.QUICK,
    *network.QUICK,
    *training.QUICK,
)
"""Some of them, for the short form."""

TOY: tuple[Case, ...] = (
    *select.TOY,
    *linear.TOY,
    *conv2d.TOY,
    *network.TOY,
    *training.TOY,
)
"""Small enough for the tests, and of every kind."""
