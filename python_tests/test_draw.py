"""Draw and Shuffle: the same bits as a generator written in plain Python, and as the paper needs
them distributed.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import masked_kernels as mk
from masked_kernels import draw
from masked_kernels.draw import Draw, Shuffle

MASK = (1 << 64) - 1


def philox_block(counter: int, seed: int, stream: int) -> list[int]:
    """Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"."""
    c = [counter, 0, 0, 0]
    key = [seed, stream]
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [
            (second >> 64) ^ c[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ c[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def philox(seed: int, stream: int, count: int) -> list[int]:
    blocks = range(1, count // 4 + 2)
    return [word for i in blocks for word in philox_block(i, seed, stream)][:count]


def unit(word: int) -> float:
    return ((word >> 12) + 0.5) * 2.0**-52


def horner(coefficients: list[float], x: float) -> float:
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def log(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = mantissa * 2, exponent - 1
    s = (mantissa - 1) / (mantissa + 1)
    series = horner([1 / k for k in range(1, 22, 2)], s * s) * s
    return exponent * 0.6931471805599453 + 2 * series


def turn(word: int) -> tuple[float, float]:
    angle = (unit((word << 2) & MASK) - 0.5) * 1.5707963267948966
    cosine = horner([(-1) ** k / math.factorial(2 * k) for k in range(9)], angle * angle)
    sine = horner([(-1) ** k / math.factorial(2 * k + 1) for k in range(8)], angle * angle) * angle
    for _ in range(word >> 62):
        cosine, sine = -sine, cosine
    return cosine, sine


def oracle(distribution: str, words: list[int]) -> list[float]:
    if distribution == "uniform":
        return [unit(w) * 2 - 1 for w in words]
    if distribution == "sign":
        return [1.0 - 2.0 * (w >> 63) for w in words]
    pairs = zip(words[0::2], words[1::2], strict=True)
    return [math.sqrt(-2 * log(unit(a))) * part for a, b in pairs for part in turn(b)]


def test_known_answers_of_philox() -> None:
    """The published ones of Philox4x64-10, of the oracle that the rest is held to."""
    assert philox_block(0, 0, 0) == [
        *(0x16554D9ECA36314C, 0xDB20FE9D672D0FDC),
        *(0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ]


@pytest.mark.parametrize("distribution", draw.DISTRIBUTIONS)
@pytest.mark.parametrize("seed, stream", ((0, 0), (1, 5), (2**63 - 1, 1 << 32)))
def test_bits_are_those_of_plain_python(distribution: str, seed: int, stream: int) -> None:
    for count in (1, 2, 3, 101):
        got = Draw(seed, stream, distribution, 0.3, count).values()
        numbers = oracle(distribution, philox(seed, stream, count + count % 2))[:count]
        assert got.dtype == torch.float32 and got.shape == (count,)
        assert got.tolist() == [float(np.float32(x * 0.3)) for x in numbers]


def test_extreme_words() -> None:
    """No infinity at either end, and the angle's quarters meet."""
    edges = [0, MASK, *(1 << i for i in (12, 62, 63)), *((1 << i) - 1 for i in (12, 62, 63))]
    words = np.array(edges, np.uint64)
    for distribution, numbers in draw.DISTRIBUTIONS.items():
        for part in (words, words[::-1].copy()):
            assert numbers(part).tolist() == oracle(distribution, part.tolist())
            assert np.isfinite(numbers(part)).all()


def test_logarithm_and_turn_are_accurate() -> None:
    words = np.random.default_rng(0).integers(0, MASK, 20_000, np.uint64, endpoint=True)
    ours, libm = draw._log(draw._unit(words)), np.log(draw._unit(words))
    assert np.abs(ours / libm - 1).max() < 1e-15
    angle = (words >> np.uint64(62)) * (np.pi / 2) + (draw._unit(words << np.uint64(2)) - 0.5) * (
        np.pi / 2
    )
    cosine, sine = draw._turn(words)
    assert max(np.abs(cosine - np.cos(angle)).max(), np.abs(sine - np.sin(angle)).max()) < 1e-15


def test_coefficients_are_correctly_rounded() -> None:
    """Factorials are exact in a float64, so one division makes each coefficient."""
    for table, first in ((draw._SIN, 1), (draw._COS, 0)):
        expected = [(-1) ** k * math.factorial(2 * k + first) for k in range(len(table))]
        assert [Fraction(c) for c in table] == expected


@pytest.mark.parametrize(
    ("distribution", "std"), [("normal", 1.0), ("uniform", 3**-0.5), ("sign", 1.0)]
)
def test_distributions(distribution: str, std: float) -> None:
    n = 400_000
    values = Draw(3, 0, distribution, 1.0, n).values().double()
    assert abs(values.mean()) < 4 * std / n**0.5
    fourth = {"normal": 3.0, "uniform": 9 / 5, "sign": 1.0}[distribution] * std**4
    assert abs(values.square().mean() - std**2) <= 4 * ((fourth - std**4) / n) ** 0.5
    if distribution == "normal":
        edges = torch.linspace(-3, 3, 25, dtype=torch.float64)
        share = (values[:, None] < edges).double().mean(0)
        assert (share - torch.special.ndtr(edges)).abs().max() < 2 / n**0.5
        assert abs((values[0::2] * values[1::2]).mean()) < 4 / (n / 2) ** 0.5
        assert values.abs().max() > 4
    elif distribution == "uniform":
        assert values.min() >= -1 and values.max() <= 1 and values.abs().max() > 0.999
    else:
        assert values.unique().tolist() == [-1, 1]


def test_a_shorter_draw_begins_a_longer_one() -> None:
    for distribution in draw.DISTRIBUTIONS:
        whole = Draw(1, 2, distribution, 0.5, (1 << 16) + 77)
        values = whole.values()
        for count in (1, 2, 999, 1 << 16, (1 << 16) + 1):
            assert torch.equal(whole.first(count).values(), values[:count])


def test_seeds_and_streams_differ() -> None:
    draws = [Draw(s, t, "normal", 1.0, 100).values() for s, t in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(torch.isin(a, b).sum() == 0 for a in draws for b in draws if a is not b)


def test_shuffle_is_one_permutation_of_the_repeated_vector() -> None:
    shuffle = Shuffle(seed=5, stream=9, period=7, length=100)
    values = torch.randn(7)
    words = philox(5, 9, 100)
    order = sorted(range(100), key=lambda i: words[i])
    shuffled = shuffle(values)
    assert shuffled.tolist() == [values[place % 7].item() for place in order]
    assert torch.equal(shuffle.undo(shuffled), values)
    assert shuffled.sort().values.tolist() == sorted(mk.Prototype(values).fill((100,)).tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Draw(-1, 0, "normal", 1.0, 1), "seed: got -1, expected an integer from 0"),
        (lambda: Draw(1 << 63, 0, "normal", 1.0, 1), "seed: got 9223372036854775808"),
        (lambda: Draw(0, True, "normal", 1.0, 1), "stream: got True"),
        (lambda: Draw(0, 0, "cauchy", 1.0, 1), "distribution: got 'cauchy', expected one of nor"),
        (lambda: Draw(0, 0, "normal", math.inf, 1), "scale: got inf"),
        (lambda: Draw(0, 0, "normal", 1, 1), "scale: got 1"),
        (lambda: Draw(0, 0, "normal", 1.0, 0), "count: got 0, expected an integer from 1"),
        (lambda: Shuffle(0, 0, 3, 2), "length: got 2, expected at least 3"),
        (lambda: Shuffle(0, 0, 0, 2), "period: got 0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
