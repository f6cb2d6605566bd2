"""``phased_linear``: prototypes of any period, read by whole cache lines."""

from torch import Tensor

from ._native import as_float, native, optional_float
from ._relaid import relaid


def phased_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    cols, period = x.shape[1], values.numel()
    tiles, rows = relaid(
        words,
        ("phased", cols, period),
        lambda: native().phased_tiles(words.contiguous(), cols, period),
    )
    padded = relaid(
        values, ("phased", cols), lambda: native().phased_values(as_float(values), cols)
    )
    y: Tensor = native().phased_linear(
        as_float(x),
        padded,
        tiles,
        rows,
        words.shape[0],
        optional_float(bias),
        optional_float(scale),
    )
    return y if x.dtype == y.dtype else y.to(x.dtype)
