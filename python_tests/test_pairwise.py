"""The choice of tests by which the interpreter stays affordable."""

from itertools import combinations, product

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(), (1,), (5,), (4, 3), (14, 7, 3), (31, 5, 3, 2), (3,) * 6])
def test_every_pair_of_values_is_met(sizes: tuple[int, ...]) -> None:
    """By few rows: pairs of the two longest parameters need as many as there are such pairs."""
    rows = [dict(zip("abcdef", row, strict=False)) for row in product(*map(range, sizes))]
    taken = [rows[i] for i in pairwise(rows)]
    for names in combinations("abcdef"[: len(sizes)], min(2, len(sizes))):
        values = {tuple(row[name] for name in names) for row in taken}
        assert values == {tuple(row[name] for name in names) for row in rows}
    longest = sorted(sizes)[-2:]
    least = longest[0] * longest[-1] if len(sizes) > 1 else len(rows)
    assert least <= len(taken) <= 1.7 * least


def test_only_pairs_that_there_are() -> None:
    """Combinations may be left out by those who write the parameters."""
    rows = [{"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}]
    assert pairwise(rows) == [0, 1, 2]
