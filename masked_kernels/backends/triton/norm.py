"""GELU and BatchNorm in one: each pass reads x, computes GELU anew, and keeps nothing of its size.

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
from ._helpers import Split, gelu, normal_cdf, on_device, split

_CHANNELS = 16  # per program of the passes over parts


def gelu_stats(x: Tensor) -> Tensor:
    stats = x.new_empty((2, x.shape[1]), dtype=at_least_float32(x.dtype))
    if stats.numel():
        _sum(_stats_kernel, _add_stats_kernel, (x,), (), stats)
    return stats


def gelu_batch_norm(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    y = new_image(x, x.shape)
    if y.numel():
        images = (x, y, x if residual is None else residual)
        vectors = (stats.contiguous(), weight, bias, residual is not None, eps)
        _map(_normalise_kernel, images, vectors)
    return y


def gelu_batch_norm_grad_affine(grad_y: Tensor, x: Tensor, stats: Tensor, eps: float) -> Tensor:
    grads = x.new_empty((2, x.shape[1]), dtype=at_least_float32(x.dtype))
    if grads.numel():
        vectors = (stats.contiguous(), eps)
        _sum(_grad_affine_kernel, _add_grad_affine_kernel, (x, grad_y), vectors, grads)
    return grads


def gelu_batch_norm_grad_x(
    grad_y: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    grad_affine: Tensor | None,
    eps: float,
) -> Tensor:
    grad_x = new_image(x, x.shape)
    if grad_x.numel():
        affine = None if grad_affine is None else grad_affine.contiguous()
        _map(_grad_x_kernel, (x, grad_x, grad_y), (stats.contiguous(), weight, affine, eps))
    return grad_x


def _map(kernel: triton.JITFunction, images: tuple[Tensor, ...], vectors: tuple) -> None:
    tile = config.image_tile(images[0].stride(1) == 1)
    _launch(kernel, images, vectors, tile, _split(images[0], tile, least=1))


def _sum(
    kernel: triton.JITFunction,
    add: triton.JITFunction,
    images: tuple[Tensor, ...],
    vectors: tuple,
    out: Tensor,
) -> None:
    """Fill ``out`` ``[2, channels]`` in two passes: parts of the pixels, then over the parts."""
    x = images[0]
    channels = x.shape[1]
    tile = config.image_tile(x.stride(1) == 1)
    parts, per_part = _split(x, tile, least=4)
    partial = x.new_empty((2, parts, channels), dtype=torch.float32)
    _launch(kernel, images, (*vectors, partial), tile, Split(parts, per_part))
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
def _at(strides, pixel, channel, pixels_of_image):
    """Offsets [pixel, channel] in an image. Without ``pixels_of_image`` all images are as one."""
    if pixels_of_image is None:
        place = pixel.to(tl.int64) * strides[2]
    else:
        place = (pixel // pixels_of_image).to(tl.int64) * strides[0]
        place += (pixel % pixels_of_image).to(tl.int64) * strides[2]
    return place[:, None] + channel.to(tl.int64)[None, :] * strides[1]


@triton.jit
def _load(image, strides, pixel, channel, pixels_of_image, ok):
    at = _at(strides, pixel, channel, pixels_of_image)
    return tl.load(image + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(vector, channel, ok):
    return tl.load(vector + channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _inverse_deviation(stats, channel, ok, channels, eps):
    var = tl.load(stats + channels + channel, mask=ok, other=1.0).to(tl.float32)
    return tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))


@triton.jit
def _part(pixels, channels, per_part, CHANNELS: tl.constexpr):
    """First pixel and end of this program's part, its channels, and whether there are such."""
    begin = tl.program_id(1) * per_part
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return begin, tl.minimum(begin + per_part, pixels), channel, channel < channels


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
    RESIDUAL: tl.constexpr,
    eps,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin, end, channel, channel_ok = _part(pixels, channels, per_part, CHANNELS)
    mean = _load_vector(stats, channel, channel_ok)
    factor = _inverse_deviation(stats, channel, channel_ok, channels, eps)
    if weight is not None:
        factor *= _load_vector(weight, channel, channel_ok)
    shift = tl.zeros_like(mean)
    if bias is not None:
        shift = _load_vector(bias, channel, channel_ok)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + tl.arange(0, PIXELS)
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = gelu(_load(x, strides_x, pixel, channel, pixels_of_image, ok))
        # The difference comes first: of values far from 0 and near one another it is exact.
        value = (value - mean[None, :]) * factor[None, :] + shift[None, :]
        if RESIDUAL:
            value += _load(residual, strides_residual, pixel, channel, pixels_of_image, ok)
        at = _at(strides_y, pixel, channel, pixels_of_image)
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
    grad_affine,
    eps,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin, end, channel, channel_ok = _part(pixels, channels, per_part, CHANNELS)
    inverse = _inverse_deviation(stats, channel, channel_ok, channels, eps)
    factor = inverse
    if weight is not None:
        factor *= _load_vector(weight, channel, channel_ok)
    if grad_affine is not None:  # mean and variance move with x
        mean = _load_vector(stats, channel, channel_ok)
        slope = inverse * _load_vector(grad_affine, channel, channel_ok) / pixels
        shift = _load_vector(grad_affine + channels, channel, channel_ok) / pixels
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + tl.arange(0, PIXELS)
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = _load(x, strides_x, pixel, channel, pixels_of_image, ok)
        grad = _load(grad_y, strides_grad_y, pixel, channel, pixels_of_image, ok)
        below = normal_cdf(value)
        if grad_affine is not None:
            grad -= shift[None, :] + (value * below - mean[None, :]) * slope[None, :]
        grad *= factor[None, :] * (below + value * _normal_density(value))
        at = _at(strides_grad_x, pixel, channel, pixels_of_image)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=ok)


@triton.jit
def _normal_density(x):
    return 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _joined(count, mean, squares):
    """Mean and sum of squared deviations [B] of groups [A, B] of ``count`` [A] values each."""
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    count = count[:, None]
    of_all = tl.sum(count * mean, axis=0) / total
    of_all += tl.sum(count * (mean - of_all[None, :]), axis=0) / total  # what rounding left
    away = mean - of_all[None, :]
    return of_all, tl.sum(squares + count * away * away, axis=0)


@triton.jit
def _store_part(partial, first, second, channel, channels):
    """This program's part of two sums over pixels."""
    at = tl.program_id(1).to(tl.int64) * channels + channel
    second_half = tl.cast(channels, tl.int64) * tl.num_programs(1)
    tl.store(partial + at, first, mask=channel < channels)
    tl.store(partial + second_half + at, second, mask=channel < channels)


@triton.jit
def _load_parts(partial, channel, channels, parts, PARTS: tl.constexpr):
    """Both sums of all parts, [PARTS, channel] each."""
    part = tl.arange(0, PARTS)
    at = part.to(tl.int64)[:, None] * channels + channel[None, :]
    ok = (part < parts)[:, None] & (channel < channels)[None, :]
    second_half = tl.cast(channels, tl.int64) * parts
    first = tl.load(partial + at, mask=ok, other=0.0)
    return first, tl.load(partial + second_half + at, mask=ok, other=0.0)


@triton.jit
def _stats_kernel(
    x,
    strides_x,
    pixels,
    pixels_of_image,
    channels,
    partial,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mean and sum of squared deviations of GELU(x) over the pixels of one part."""
    begin, end, channel, channel_ok = _part(pixels, channels, per_part, CHANNELS)
    lane = tl.arange(0, PIXELS)
    ok = (begin + lane < end)[:, None] & channel_ok[None, :]
    first = gelu(_load(x, strides_x, begin + lane, channel, pixels_of_image, ok))
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + lane
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = gelu(_load(x, strides_x, pixel, channel, pixels_of_image, ok))
        away = tl.where(ok, value - first, 0.0)
        sums += away
        squares += away * away
    count = tl.maximum((end - begin - lane + PIXELS - 1) // PIXELS, 0).to(tl.float32)
    away = sums / tl.maximum(count, 1.0)[:, None]
    mean_of_all, squares_of_all = _joined(count, first + away, squares - sums * away)
    _store_part(partial, mean_of_all, squares_of_all, channel, channels)


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
    mean, squares = _load_parts(partial, channel, channels, parts, PARTS)
    begin = tl.arange(0, PARTS).to(tl.int64) * per_part
    count = tl.minimum(tl.maximum(pixels - begin, 0), per_part)
    mean_of_all, squares_of_all = _joined(count.to(tl.float32), mean, squares)
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
    eps,
    partial,
    per_part,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of grad_y * (GELU(x) - mean) and of grad_y over the pixels of one part."""
    begin, end, channel, channel_ok = _part(pixels, channels, per_part, CHANNELS)
    mean = _load_vector(stats, channel, channel_ok)
    products = tl.zeros((PIXELS, CHANNELS), tl.float32)
    grads = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in tl.range(begin, end, PIXELS, num_stages=STAGES):
        pixel = start + tl.arange(0, PIXELS)
        ok = (pixel < end)[:, None] & channel_ok[None, :]
        value = gelu(_load(x, strides_x, pixel, channel, pixels_of_image, ok))
        grad = _load(grad_y, strides_grad_y, pixel, channel, pixels_of_image, ok)
        products += (value - mean[None, :]) * grad
        grads += grad
    _store_part(partial, tl.sum(products, axis=0), tl.sum(grads, axis=0), channel, channels)


@triton.jit
def _add_grad_affine_kernel(
    partial,
    grads,
    stats,
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
    products, sums = _load_parts(partial, channel, channels, parts, PARTS)
    inverse = _inverse_deviation(stats, channel, ok, channels, eps)
    tl.store(grads + channel, tl.sum(products, axis=0) * inverse, mask=ok)
    tl.store(grads + channels + channel, tl.sum(sums, axis=0), mask=ok)
