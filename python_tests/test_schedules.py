"""Learning-rate schedules against values worked by hand."""

import math

import pytest

from masked_kernels.training.schedules import constant, cosine, triangular


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.0),
        (20, 0.025),  # halfway up
        (40, 0.05),  # the peak at 2/5
        (60, 0.02625),  # midway between 0.05 and 0.0025
        (80, 0.0025),  # a twentieth at 4/5
        (90, 0.00125),
        (100, 0.0),
    ],
)
def test_triangular_has_the_papers_knots(epoch: float, rate: float) -> None:
    assert triangular(epoch, 100, 0.05) == pytest.approx(rate, abs=1e-12)


def test_triangular_still_rises_and_falls_in_two_epochs() -> None:
    assert triangular(0.4, 2, 1.0) == pytest.approx(0.5)
    assert triangular(0.8, 2, 1.0) == pytest.approx(1.0)
    assert triangular(1.6, 2, 1.0) == pytest.approx(0.05)


def test_cosine_starts_at_the_rate_and_ends_at_zero() -> None:
    assert cosine(0, 10, 0.1) == pytest.approx(0.1)
    assert cosine(2.5, 10, 0.1) == pytest.approx(0.05 * (1 + math.sqrt(0.5)))
    assert cosine(5, 10, 0.1) == pytest.approx(0.05)
    assert cosine(10, 10, 0.1) == pytest.approx(0.0, abs=1e-12)


def test_constant_stays() -> None:
    assert constant(0, 10, 0.3) == constant(9.9, 10, 0.3) == 0.3
