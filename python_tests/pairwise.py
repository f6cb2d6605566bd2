"""A few tests of many: every pair of parameter values is met, not every combination."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def pairwise(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Which rows to take so that each pair of values that stands in any row stands in one taken;
    those of a single name each value, and the row that has none.

    Takes the row with the most pairs that are still missing, the first of several.
    """
    pairs = [{*combinations(row.items(), min(2, len(row)))} for row in rows]
    missing = set().union(*pairs)
    taken = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        taken.append(best)
    return sorted(taken)
