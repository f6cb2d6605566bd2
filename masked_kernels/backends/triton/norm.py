"""BatchNorm with GELU before it or ReLU after it in one: each pass reads x, computes GELU or what
passed the ReLU anew, and keeps nothing of its size.

Images are ``[B, C, pixels]`` by their strides. A program takes some channels and one part of all
pixels, so that it prepares its channels once and loads ahead. Its lanes sum on their own; the lanes
and then the parts are put together in a fixed order. A lane sums deviations from its first value,
and means are joined by the update of Chan, Golub and LeVeque, so that values far from zero lose
nothing to the square of their mean.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import at_least_float32
from . import config
from ._conv import new_image
from ._helpers import Split, normal_cdf, on_device, split
from ._norm import (
    factors,
    inverse_deviation,
    joined,
    load,
    load_parts,
    load_value,
    load_vector,
    normal_density,
    normalised,
    offsets,
    part_of_pixels,
    store_part,
    through_relu,
)

_CHANNELS = 16  # per program of the passes over parts


def gelu_stats(x: Tensor) -> Tensor:
    return _stats(x, True)


def gelu_batch_norm(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    return _normalise(x, stats, weight, bias, residual, eps, True)


def gelu_batch_norm_grads(
    grad_y: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, of_batch: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return _grads(grad_y, x, (stats.contiguous(), weight, None, eps), of_batch, True, False)


def batch_norm_stats(x: Tensor) -> Tensor:
    return _stats(x, False)


def batch_norm_relu(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    return _normalise(x, stats, weight, bias, residual, eps, False)


def batch_norm_relu_grads(
    grad_y: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    is_of_norm: bool,
    of_batch: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _grads(
        grad_y, x, (stats.contiguous(), weight, bias, eps), of_batch, False, not is_of_norm
    )


def _stats(x: Tensor, gelu: bool) -> Tensor:
    stats = x.new_empty((2, x.shape[1]), dtype=at_least_float32(x.dtype))
    if stats.numel():
        _sum(_stats_kernel, _add_stats_kernel, (x,), (), (gelu,), stats)
    return stats


def _normalise(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gelu: bool,
) -> Tensor:
    y = new_image(x, x.shape)
    if y.numel():
        images = (x, y, x if residual is None else residual)
        vectors = (stats.contiguous(), weight, bias, eps, residual is not None, gelu)
        _map(_normalise_kernel, images, vectors)
    return y


def _grads(
    grad_y: Tensor, x: Tensor, vectors: tuple, of_batch: bool, gelu: bool, gated: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, [2, channels], of weight and bias; grad_y comes through the ReLU if
    ``gated``.
    """
    grad_x = new_image(x, x.shape)
    grad_affine = x.new_empty((2, x.shape[1]), dtype=at_least_float32(x.dtype))
    flags = (gelu, gated)
    if grad_affine.numel():
        images = (x, grad_y)
        _sum(_grad_affine_kernel, _add_grad_affine_kernel, images, vectors, flags, grad_affine)
    if grad_x.numel():
        moves = grad_affine if of_batch else None
        _map(_grad_x_kernel, (x, grad_x, grad_y), (*vectors, moves, *flags))
    return grad_x, grad_affine


def _map(kernel: triton.JITFunction, images: tuple[Tensor, ...], vectors: tuple) -> None:
    tile = config.image_tile(images[0].stride(1) == 1)
    _launch(kernel, images, vectors, tile, _split(images[0], tile, least=1))


def _sum(
    kernel: triton.JITFunction,
    add: triton.JITFunction,
    images: tuple[Tensor, ...],
    vectors: tuple,
    flags: tuple[bool, ...],
    out: Tensor,
) -> None:
    """Fill ``out`` ``[2, channels]`` in two passes: parts of the pixels, then over the parts."""
    x = images[0]
    channels = x.shape[1]
    tile = config.image_tile(x.stride(1) == 1)
    parts, per_part = _split(x, tile, least=4)
    partial = x.new_empty((2, parts, channels), dtype=torch.float32)
    _launch(kernel, images, (*vectors, partial, *flags), tile, Split(parts, per_part))
    with on_device(x):
        add[(config.cdiv(channels, _CHANNELS),)](
            *(partial, out, *vectors, x.numel() // channels, channels, parts, per_part),
            *(config.next_power_of_2(parts), _CHANNELS),
        )


def _split(x: Tensor, tile: config.ImageTile, least: int) -> Split:
    """Parts of the pixels of all images."""
    channels = x.shape[1]
    blocks = config.cdiv(channels, tile.channels)
    return split(x, blocks, x.numel() // channels, tile.pixels, least)


def _launch(
    kernel: triton.JITFunction,
    images: tuple[Tensor, ...],
    vectors: tuple,
    tile: config.ImageTile,
    parts: Split,
) -> None:
    """A program for each block of channels and part of the pixels. An image whose rows do not
    follow one another is copied.
    """
    x = images[0]
    batch, channels, *size = x.shape
    in_image = size[0] * size[1]
    flat = [image.flatten(2) for image in images]
    one_stride = all(image.stride(0) == in_image * image.stride(2) for image in flat)
    with on_device(x):
        kernel[(config.cdiv(channels, tile.channels), parts.parts)](
            *(argument for image in flat for argument in (image, image.stride())),
            *(batch * in_image, None if one_stride else in_image, channels),
            *(*vectors, parts.length, tile.pixels, tile.channels, tile.stages),
            num_warps=tile.warps,
        )


@triton.jit
def _normalise_kernel(
    x,
    strides_x,
    y,
    strides_y,
    residual,
    strides_residual,
    pixels,
    pixels_of_image,
    channels,
    stats,
    weight,
    bias,
    eps,
    RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin, end, channel, channel_ok = part_of_pixels(pixels, channels, per_part, CHANNELS)
    mean, factor, shift = factors(stats, weight, bias, channel, channel_ok, channels, eps)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + tl.arange(0, PIXELS)
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = load_value(x, strides_x, pixel, channel, pixels_of_image, ok, GELU)
        value = normalised(value, mean, factor, shift)
        if RESIDUAL:
            value += load(residual, strides_residual, pixel, channel, pixels_of_image, ok)
        if not GELU:
            value = through_relu(value, value)
        at = offsets(strides_y, pixel, channel, pixels_of_image)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _grad_x_kernel(
    x,
    strides_x,
    grad_x,
    strides_grad_x,
    grad_y,
    strides_grad_y,
    pixels,
    pixels_of_image,
    channels,
    stats,
    weight,
    bias,
    eps,
    grad_affine,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin, end, channel, channel_ok = part_of_pixels(pixels, channels, per_part, CHANNELS)
    mean, factor, shift = factors(stats, weight, bias, channel, channel_ok, channels, eps)
    if grad_affine is not None:  # mean and variance move with x
        inverse = inverse_deviation(stats, channel, channel_ok, channels, eps)
        slope = inverse * load_vector(grad_affine, channel, channel_ok) / pixels
        of_all = load_vector(grad_affine + channels, channel, channel_ok) / pixels
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + tl.arange(0, PIXELS)
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = load(x, strides_x, pixel, channel, pixels_of_image, ok)
        grad = load(grad_y, strides_grad_y, pixel, channel, pixels_of_image, ok)
        bend = tl.full((PIXELS, CHANNELS), 1.0, tl.float32)
        if GELU:
            below = normal_cdf(value)
            bend = below + value * normal_density(value)
            value *= below
        if GATED:
            grad = through_relu(grad, normalised(value, mean, factor, shift))
        if grad_affine is not None:
            grad -= of_all[None, :] + (value - mean[None, :]) * slope[None, :]
        grad *= factor[None, :] * bend
        at = offsets(strides_grad_x, pixel, channel, pixels_of_image)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=ok)


@triton.jit
def _stats_kernel(
    x,
    strides_x,
    pixels,
    pixels_of_image,
    channels,
    partial,
    GELU: tl.constexpr,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mean and sum of squared deviations of the values over the pixels of one part."""
    begin, end, channel, channel_ok = part_of_pixels(pixels, channels, per_part, CHANNELS)
    lane = tl.arange(0, PIXELS)
    ok = (begin + lane < end)[:, None] & channel_ok[None, :]
    first = load_value(x, strides_x, begin + lane, channel, pixels_of_image, ok, GELU)
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + lane
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = load_value(x, strides_x, pixel, channel, pixels_of_image, ok, GELU)
        away = tl.where(ok, value - first, 0.0)
        sums += away
        squares += away * away
    count = tl.maximum((end - begin - lane + PIXELS - 1) // PIXELS, 0).to(tl.float32)
    away = sums / tl.maximum(count, 1.0)[:, None]
    mean_of_all, squares_of_all = joined(count, first + away, squares - sums * away)
    store_part(partial, mean_of_all, squares_of_all, channel, channels)


@triton.jit
def _add_stats_kernel(
    partial,
    stats,
    pixels,
    channels,
    parts,
    per_part,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean, squares = load_parts(partial, channel, channels, parts, PARTS)
    begin = tl.arange(0, PARTS).to(tl.int64) * per_part
    count = tl.minimum(tl.maximum(pixels - begin, 0), per_part)
    mean_of_all, squares_of_all = joined(count.to(tl.float32), mean, squares)
    ok = channel < channels
    tl.store(stats + channel, mean_of_all, mask=ok)
    tl.store(stats + channels + channel, squares_of_all / pixels, mask=ok)


@triton.jit
def _grad_affine_kernel(
    x,
    strides_x,
    grad_y,
    strides_grad_y,
    pixels,
    pixels_of_image,
    channels,
    stats,
    weight,
    bias,
    eps,
    partial,
    GELU: tl.constexpr,
    GATED: tl.constexpr,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of grad * (value - mean) and of grad, the gradient of what was normalised, over the
    pixels of one part.
    """
    begin, end, channel, channel_ok = part_of_pixels(pixels, channels, per_part, CHANNELS)
    mean, factor, shift = factors(stats, weight, bias, channel, channel_ok, channels, eps)
    products = tl.zeros((PIXELS, CHANNELS), tl.float32)
    grads = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + tl.arange(0, PIXELS)
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = load_value(x, strides_x, pixel, channel, pixels_of_image, ok, GELU)
        grad = load(grad_y, strides_grad_y, pixel, channel, pixels_of_image, ok)
        if GATED:
            grad = through_relu(grad, normalised(value, mean, factor, shift))
        products += (value - mean[None, :]) * grad
        grads += grad
    store_part(partial, tl.sum(products, axis=0), tl.sum(grads, axis=0), channel, channels)


@triton.jit
def _add_grad_affine_kernel(
    partial,
    grads,
    stats,
    weight,
    bias,
    eps,
    pixels,
    channels,
    parts,
    per_part,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    ok = channel < channels
    products, sums = load_parts(partial, channel, channels, parts, PARTS)
    inverse = inverse_deviation(stats, channel, ok, channels, eps)
    tl.store(grads + channel, tl.sum(products, axis=0) * inverse, mask=ok)
    tl.store(grads + channels + channel, tl.sum(sums, axis=0), mask=ok)
