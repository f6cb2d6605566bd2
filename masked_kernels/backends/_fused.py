"""What ``masked_conv2d_fused`` and ``masked_conv2d_chain`` mean, in terms of a backend's own
convolution.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ._epilogue import finished

GEOMETRY = 9  # integers a step: kernel_size, stride, padding, dilation (two each) and groups


def steps(
    values: list[Tensor],
    words: list[Tensor],
    affines: list[Tensor],
    activations: list[str],
    adds_input: list[bool],
    geometry: list[int],
) -> Iterator[tuple[Any, ...]]:
    """Of each step: (values, words, affine, activation), adds_input, (kernel_size, ..., groups)."""
    for i, operands in enumerate(zip(values, words, affines, activations, strict=True)):
        one = geometry[i * GEOMETRY : (i + 1) * GEOMETRY]
        yield operands, adds_input[i], (one[0:2], one[2:4], one[4:6], one[6:8], one[8])


def masked_conv2d_fused(
    masked_conv2d: Callable[..., Tensor],
    x: Tensor,
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """The convolution, then what ``finished`` does."""
    y = masked_conv2d(x, values, words, None, None, *geometry)
    return finished(y, affine, activation, residual)


def masked_conv2d_chain(
    masked_conv2d_fused: Callable[..., Tensor], x: Tensor, *operands: Any
) -> Tensor:
    """The fused convolutions in turn, each on the result of the one before."""
    for of_step, adds_input, geometry in steps(*operands):
        x = masked_conv2d_fused(x, *of_step, x if adds_input else None, *geometry)
    return x
