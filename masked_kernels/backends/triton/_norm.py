"""What the kernels of BatchNorm share."""

import triton
import triton.language as tl

from ._helpers import gelu


@triton.jit
def offsets(strides, pixel, channel, pixels_of_image):
    """Offsets [pixel, channel] in an image. Without ``pixels_of_image`` all images are as one."""
    if pixels_of_image is None:
        place = pixel.to(tl.int64) * strides[2]
    else:
        place = (pixel // pixels_of_image).to(tl.int64) * strides[0]
        place += (pixel % pixels_of_image).to(tl.int64) * strides[2]
    return place[:, None] + channel.to(tl.int64)[None, :] * strides[1]


@triton.jit
def load(image, strides, pixel, channel, pixels_of_image, ok):
    at = offsets(strides, pixel, channel, pixels_of_image)
    return tl.load(image + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_value(x, strides, pixel, channel, pixels_of_image, ok, GELU: tl.constexpr):
    """What is normalised."""
    value = load(x, strides, pixel, channel, pixels_of_image, ok)
    if GELU:
        value = gelu(value)
    return value


@triton.jit
def load_vector(vector, channel, ok):
    return tl.load(vector + channel, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def inverse_deviation(stats, channel, ok, channels, eps):
    var = tl.load(stats + channels + channel, mask=ok, other=1.0).to(tl.float32)
    return tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))


@triton.jit
def factors(stats, weight, bias, channel, ok, channels, eps):
    """Mean, and what its difference is multiplied with and what added, [channel] each."""
    factor = inverse_deviation(stats, channel, ok, channels, eps)
    if weight is not None:
        factor *= load_vector(weight, channel, ok)
    mean = load_vector(stats, channel, ok)
    shift = tl.zeros_like(mean)
    if bias is not None:
        shift = load_vector(bias, channel, ok)
    return mean, factor, shift


@triton.jit
def normalised(value, mean, factor, shift):
    # The difference comes first: of values far from 0 and near one another it is exact.
    return (value - mean[None, :]) * factor[None, :] + shift[None, :]


@triton.jit
def through_relu(grad, value):
    """Of the value itself or of its gradient, what passes: that of NaN, too."""
    return tl.where(value <= 0.0, 0.0, grad)


@triton.jit
def normal_density(x):
    return 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def part_of_pixels(pixels, channels, per_part, CHANNELS: tl.constexpr):
    """First pixel and end of this program's part, its channels, and whether there are such."""
    begin = tl.program_id(1) * per_part
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return begin, tl.minimum(begin + per_part, pixels), channel, channel < channels


@triton.jit
def joined(count, mean, squares):
    """Mean and sum of squared deviations [B] of groups [A, B] of ``count`` [A] values each."""
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    count = count[:, None]
    of_all = tl.sum(count * mean, axis=0) / total
    of_all += tl.sum(count * (mean - of_all[None, :]), axis=0) / total  # what rounding left
    away = mean - of_all[None, :]
    return of_all, tl.sum(squares + count * away * away, axis=0)


@triton.jit
def store_part(partial, first, second, channel, channels):
    """This program's part of two sums over pixels."""
    at = tl.program_id(1).to(tl.int64) * channels + channel
    second_half = tl.cast(channels, tl.int64) * tl.num_programs(1)
    tl.store(partial + at, first, mask=channel < channels)
    tl.store(partial + second_half + at, second, mask=channel < channels)


@triton.jit
def load_parts(partial, channel, channels, parts, PARTS: tl.constexpr):
    """Both sums of all parts, [PARTS, channel] each."""
    part = tl.arange(0, PARTS)
    at = part.to(tl.int64)[:, None] * channels + channel[None, :]
    ok = (part < parts)[:, None] & (channel < channels)[None, :]
    second_half = tl.cast(channels, tl.int64) * parts
    first = tl.load(partial + at, mask=ok, other=0.0)
    return first, tl.load(partial + second_half + at, mask=ok, other=0.0)
