"""Numbers that a seed makes anew, the same on every machine (docs/draws.md)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 16  # values at a time, so that what lies between stays in the cache; even
_LN2 = 0.6931471805599453
_HALF_PI = 1.5707963267948966
_SQRT_HALF = 0.7071067811865476
_ATANH = [1 / k for k in range(1, 22, 2)]  # atanh(s) / s, by powers of s * s
_SIN = (1.0, -6.0, 120.0, -5040.0, 362880.0, -39916800.0, 6227020800.0, -1307674368000.0)
_COS = (1.0, -2.0, 24.0, -720.0, 40320.0, -3628800.0, 479001600.0, -87178291200.0, 20922789888000.0)


@dataclass(frozen=True)
class Draw:
    """``count`` float32 numbers from a seed.

    A shorter draw is the beginning of a longer one. They are made of integers and of correctly
    rounded float64 operations alone, so that they are the same bits everywhere.

    Args:
        seed: from 0 to ``2**63 - 1``.
        stream: as the seed; streams of a seed are independent of one another.
        distribution: ``normal`` (mean 0, standard deviation 1), ``uniform`` (from -1 to 1) or
            ``sign`` (-1 or 1).
        scale: that the numbers are multiplied by, finite.
        count: how many, at least 1.
    """

    seed: int
    stream: int
    distribution: str
    scale: float
    count: int

    def __post_init__(self) -> None:
        _check_integers(self, seed=0, stream=0, count=1)
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution: got {self.distribution!r}, "
                f"expected one of {', '.join(DISTRIBUTIONS)}"
            )
        if not isinstance(self.scale, float) or not np.isfinite(self.scale):
            raise ValueError(f"scale: got {self.scale!r}, expected a finite float")

    def first(self, count: int) -> "Draw":
        return replace(self, count=count)

    @staticmethod
    def words(seed: int, stream: int, count: int) -> Words:
        """The random words that draws of this seed and stream are made of."""
        return _source(seed, stream).random_raw(count)

    def values(self) -> Tensor:
        """The numbers, float32 ``[count]`` on the CPU."""
        source = _source(self.seed, self.stream)
        numbers = DISTRIBUTIONS[self.distribution]
        values = np.empty(self.count, np.float32)
        for start in range(0, self.count, _CHUNK):
            part = values[start : start + _CHUNK]
            words = source.random_raw(len(part) + len(part) % 2)
            part[:] = (numbers(words) * self.scale)[: len(part)]
        return torch.from_numpy(values)


@dataclass(frozen=True)
class Shuffle:
    """A vector repeated to ``length`` and then permuted, by a seed.

    Args:
        seed, stream: as in ``Draw``.
        period: elements of the vector that is repeated, at least 1.
        length: elements of the result, at least ``period``.
    """

    seed: int
    stream: int
    period: int
    length: int

    def __post_init__(self) -> None:
        _check_integers(self, seed=0, stream=0, period=1, length=1)
        if self.length < self.period:
            raise ValueError(f"length: got {self.length}, expected at least {self.period}")

    def __call__(self, values: Tensor) -> Tensor:
        """``[period]`` to ``[length]``: element i is ``values[order[i] % period]``."""
        return values[self.order().to(values.device) % self.period]

    def undo(self, shuffled: Tensor) -> Tensor:
        """``[length]`` to the ``[period]`` that it was made of."""
        place = self.order().to(shuffled.device).argsort()
        return shuffled[place[: self.period]]

    def order(self) -> Tensor:
        """int64 ``[length]`` on the CPU: the element of the repeated vector that each one is."""
        words = Draw.words(self.seed, self.stream, self.length)
        return torch.from_numpy(np.argsort(words, kind="stable"))


def _source(seed: int, stream: int) -> np.random.Philox:
    """Philox4x64-10 with the key (seed, stream), whose first block is that of counter 1."""
    return np.random.Philox(counter=0, key=np.array([seed, stream], np.uint64))


def _check_integers(fields: Draw | Shuffle, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(fields, name)
        if type(value) is not int or not minimum <= value < 1 << 63:
            raise ValueError(
                f"{name}: got {value!r}, expected an integer from {minimum} to 2**63 - 1"
            )


def _unit(words: Words) -> Floats:
    """The middles of ``2**52`` equal parts of 0..1."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _uniform(words: Words) -> Floats:
    return _unit(words) * 2.0 - 1.0


def _sign(words: Words) -> Floats:
    return 1.0 - (words >> np.uint64(63)).astype(np.float64) * 2.0


def _normal(words: Words) -> Floats:
    """Box-Muller: two words, a radius and an angle, make two numbers."""
    radius = np.sqrt(_log(_unit(words[0::2])) * -2.0)
    numbers = np.empty(len(words))
    cosine, sine = _turn(words[1::2])
    numbers[0::2] = radius * cosine
    numbers[1::2] = radius * sine
    return numbers


def _log(x: Floats) -> Floats:
    """The natural logarithm of numbers from 0 to 1. Libraries differ in the last bit of theirs."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner(_ATANH, ratio * ratio) * ratio
    return (exponent - low).astype(np.float64) * _LN2 + series * 2.0


def _turn(words: Words) -> tuple[Floats, Floats]:
    """Cosine and sine of an angle: a quarter of the turn from the leading two bits, and from the 52
    after them where in -pi/4..pi/4 around its middle.
    """
    angle = (_unit(words << np.uint64(2)) - 0.5) * _HALF_PI
    square = angle * angle
    cosine = _horner([1 / c for c in _COS], square)
    sine = _horner([1 / c for c in _SIN], square) * angle
    quarter = words >> np.uint64(62)
    swap, negate = quarter % 2 == 1, quarter >= 2
    cosine, sine = np.where(swap, -sine, cosine), np.where(swap, cosine, sine)
    return np.where(negate, -cosine, cosine), np.where(negate, -sine, sine)


def _horner(coefficients: list[float], x: Floats) -> Floats:
    """``coefficients[0] + x * (coefficients[1] + x * ...)``, from the inside out."""
    highest = np.full_like(x, coefficients[-1])
    return reduce(lambda total, c: total * x + c, reversed(coefficients[:-1]), highest)


DISTRIBUTIONS: dict[str, Callable[[Words], Floats]] = {
    "normal": _normal,
    "uniform": _uniform,
    "sign": _sign,
}
"""From an even number of random words to as many numbers."""
