"""Fused convolutions in turn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _fused
from ._native import as_float, native
from .aligned import aligned_operands
from .conv2d import out_size
from .depthwise import as_pixels
from .fused import Kernel, fused_, kernel_of, pixels_size

_NUMBERS: dict[Kernel, int] = {"depthwise": 0, "aligned": 1, "panels": 2}
_SLICE_BYTES = 1 << 20  # of an activation, for each thread


def masked_conv2d_chain(x: Tensor, *operands: Any) -> Tensor:
    return bind_masked_conv2d_chain(x, *operands)(x)


def bind_masked_conv2d_chain(
    x: Tensor,
    values: list[Tensor],
    words: list[Tensor],
    affines: list[Tensor],
    activations: list[str],
    adds_input: list[bool],
    geometry: list[int],
) -> Callable[[Tensor], Tensor]:
    """``masked_conv2d_chain`` of images like x: one call of the kernels where they serve every
    step, else a call a step.
    """
    rows = tuple(each.shape[0] for each in words)
    periods = tuple(each.numel() for each in values)
    kernels = _kernels(as_pixels(x).shape[1:], rows, periods, geometry)
    if kernels is None:
        steps = list(_fused.steps(values, words, affines, activations, adds_input, geometry))
        return lambda x: _in_slices(as_pixels(x), steps).permute(0, 3, 1, 2)
    operands = [
        aligned_operands(kernel.channels, v, w, kernel.geometry)
        if kernel.number == _NUMBERS["aligned"]
        else (as_float(v), w.contiguous())
        for kernel, v, w in zip(kernels, values, words, strict=True)
    ]
    # Detached: a tensor given other data would take the memory away that the chain reads.
    held, bits = ([t.detach() for t in each] for each in zip(*operands, strict=True))
    affines = [affine.detach().contiguous() for affine in affines]
    numbers: list[int] = []
    for kernel, adds in zip(kernels, adds_input, strict=True):
        numbers += (kernel.number, adds, *kernel.geometry)
    chain = native().prepare_chain(as_pixels(x), held, bits, affines, activations, numbers)
    run = native().masked_conv2d_chain.default

    def bound(x: Tensor) -> Tensor:
        y: Tensor = run(as_pixels(x), chain)
        return y.permute(0, 3, 1, 2)

    return bound


class _Kernel(NamedTuple):
    """What serves a step."""

    number: int
    channels: int
    geometry: tuple[int, ...]  # kernel, stride, padding and dilation


def _kernels(
    size: Sequence[int],  # [H, W, C]
    rows: Sequence[int],
    periods: Sequence[int],
    geometry: Sequence[int],
) -> list[_Kernel] | None:
    """Of every step; None if one has no kernel that works image by image."""
    kernels = []
    for i, (outputs, period) in enumerate(zip(rows, periods, strict=True)):
        *of_step, groups = geometry[i * _fused.GEOMETRY : (i + 1) * _fused.GEOMETRY]
        *spatial, channels = size
        kernel = kernel_of((1, *size), outputs, period, of_step, groups)
        if kernel is None:
            return None
        kernels.append(_Kernel(_NUMBERS[kernel], channels, tuple(of_step)))
        size = (*out_size(spatial, of_step), outputs)
    return kernels


def _in_slices(pixels: Tensor, steps: list[tuple[Any, ...]]) -> Tensor:
    """In slices of the batch, to and fro between two buffers that stay in the cache.

    A new result for every step would cost as much as the steps: memory that the system hands out
    anew comes page by page.
    """
    sizes = [pixels.shape]
    for operands, _, of_conv in steps:
        sizes.append(pixels_size(sizes[-1], operands[1], of_conv))
    y = pixels.new_empty(sizes[-1])
    largest = max((size[1:].numel() for size in sizes[1:-1]), default=0)
    bytes_of_image = max(largest, 1) * pixels.element_size()
    images = max(torch.get_num_threads() * _SLICE_BYTES // bytes_of_image, 1)
    buffers = pixels.new_empty((2, min(images, len(pixels)) * largest))
    for begin in range(0, len(pixels), images):
        part = pixels[begin : begin + images]
        for i, (operands, adds, of_conv) in enumerate(steps):
            if i + 1 < len(steps):
                size = torch.Size((len(part), *sizes[i + 1][1:]))
                out = buffers[i % 2, : size.numel()].view(size)
            else:
                out = y[begin : begin + images]
            fused_(out, part, operands, part if adds else None, of_conv)
            part = out
    return y
