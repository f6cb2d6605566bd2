"""A second oracle beside ``backends/reference.py``: plain Python loops over floats, sharing no code
with the package.
"""

import math
from itertools import product


def pack(rows: list[list[bool]]) -> list[list[int]]:
    """Words as signed 32-bit integers."""
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), 32):
            word = sum(1 << j for j, bit in enumerate(row[start : start + 32]) if bit)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(words)
    return packed


def topk(scores: list[float], density: float, absolute: bool = True) -> list[bool]:
    drop = int((1 - density) * len(scores))
    order = sorted(range(len(scores)), key=lambda i: (abs(scores[i]) if absolute else scores[i], i))
    dropped = set(order[:drop])
    return [i not in dropped for i in range(len(scores))]


def nm(row: list[float], n: int, m: int, absolute: bool = True) -> list[bool]:
    kept: list[bool] = []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        order = sorted(
            range(len(group)), key=lambda i: (abs(group[i]) if absolute else group[i], i)
        )
        dropped = set(order[: max(len(group) - n, 0)])
        kept += [i not in dropped for i in range(len(group))]
    return kept


def fill(values: list[float], count: int) -> list[float]:
    filled: list[float] = []
    while len(filled) < count:
        filled += values[: count - len(filled)]
    return filled


def linear(
    x: list[list[float]], weight: list[list[float]], mask: list[list[bool]], bias: list[float]
) -> list[list[float]]:
    return [
        [
            b + math.fsum(xi * wi for xi, wi, keep in zip(token, w, m, strict=True) if keep)
            for w, m, b in zip(weight, mask, bias, strict=True)
        ]
        for token in x
    ]


def conv2d(x, weight, mask, bias, stride, padding, dilation, groups):
    """Nested lists: x [B][C][H][W], weight and mask [N][C / groups][kh][kw]; the three geometry
    arguments are (h, w) pairs.
    """
    channels, height, width = len(x[0]), len(x[0][0]), len(x[0][0][0])
    kh, kw = len(weight[0][0]), len(weight[0][0][0])
    out_h = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1

    def at(image, n, i, j):
        group = n * groups // len(weight)
        terms = []
        for c, r, s in product(range(channels // groups), range(kh), range(kw)):
            h = i * stride[0] - padding[0] + r * dilation[0]
            w = j * stride[1] - padding[1] + s * dilation[1]
            if mask[n][c][r][s] and 0 <= h < height and 0 <= w < width:
                terms.append(image[group * channels // groups + c][h][w] * weight[n][c][r][s])
        return bias[n] + math.fsum(terms)

    return [
        [
            [[at(image, n, i, j) for j in range(out_w)] for i in range(out_h)]
            for n in range(len(weight))
        ]
        for image in x
    ]
