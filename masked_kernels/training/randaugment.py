"""RandAugment (Cubuk et al. 2020) on whole batches.

Each image draws its own operations. An operation acts on the images that drew it, so a batch
costs about as much as applying one operation to every image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .augment import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    blend,
)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Take output pixel (x, y) from input pixel ``matrix @ (x, y, 1)``; outside is black.

    Coordinates are in pixels with the first pixel's centre at (0.5, 0.5); the nearest pixel is
    used. uint8 ``(B, C, H, W)`` and float ``(2, 3)`` or ``(B, 2, 3)``.
    """
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5,
        torch.arange(width, device=images.device) + 0.5,
        indexing="ij",
    )
    points = torch.stack([x.flatten(), y.flatten(), torch.ones(height * width, device=x.device)])
    source = matrix @ points  # (B, 2, H * W)
    source = source.expand(len(images), 2, height * width).transpose(1, 2)
    size = torch.tensor([width, height], device=images.device)
    grid = (2 * source / size - 1).view(-1, height, width, 2)
    moved = F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
    return moved.to(torch.uint8)


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """Move row y by ``amount * y`` pixels; amount ``(B,)``."""
    return affine(images, _matrix(images, ((1, amount, 0), (0, 1, 0))))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Move column x by ``amount * x`` pixels; amount ``(B,)``."""
    return affine(images, _matrix(images, ((1, 0, 0), (amount, 1, 0))))


def translate_x(images: Tensor, amount: Tensor) -> Tensor:
    """Move by whole pixels, ``amount * width`` cut towards 0; amount ``(B,)``."""
    pixels = (amount * images.shape[3]).trunc()
    return affine(images, _matrix(images, ((1, 0, pixels), (0, 1, 0))))


def translate_y(images: Tensor, amount: Tensor) -> Tensor:
    """Move by whole pixels, ``amount * height`` cut towards 0; amount ``(B,)``."""
    pixels = (amount * images.shape[2]).trunc()
    return affine(images, _matrix(images, ((1, 0, 0), (0, 1, pixels))))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate about the centre; degrees ``(B,)``."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    cy, cx = images.shape[2] / 2, images.shape[3] / 2
    to_x = (cos, sin, cx - cos * cx - sin * cy)
    to_y = (-sin, cos, cy + sin * cx - cos * cy)
    return affine(images, _matrix(images, (to_x, to_y)))


def _matrix(images: Tensor, rows: tuple[tuple[Tensor | float, ...], ...]) -> Tensor:
    """Return float ``(B, 2, 3)`` from entries that are numbers or ``(B,)``."""
    entries = [
        torch.as_tensor(entry, dtype=torch.float32, device=images.device).expand(len(images))
        for row in rows
        for entry in row
    ]
    return torch.stack(entries, dim=1).view(-1, 2, 3)


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13, whose border is kept."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    channels = images.shape[1]
    weight = (kernel / 13).expand(channels, 1, 3, 3)
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(smooth, weight, groups=channels).round()
    return blend(images, smooth, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` bits of each value; bits ``(B,)``."""
    kept = (256 - 2 ** (8 - bits)).to(torch.uint8)
    return images & kept.view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values at or above the threshold ``(B,)``."""
    return torch.where(images >= threshold.view(-1, 1, 1, 1), 255 - images, images)


def autocontrast(images: Tensor, unused: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a channel of one value is kept."""
    low = images.amin(dim=(2, 3), keepdim=True).float()
    high = images.amax(dim=(2, 3), keepdim=True).float()
    stretched = (images - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched.clamp(0, 255).to(torch.uint8), images)


def equalize(images: Tensor, unused: Tensor) -> Tensor:
    """Spread each channel's values so that their histogram is as flat as integers allow.

    With ``step`` = (pixels - pixels of the largest value) // 255, value v becomes
    (pixels below v + step // 2) // step; a channel whose step is 0 is kept.
    """
    values = images.flatten(2).long()  # (B, C, H * W)
    counts = values.new_zeros(*values.shape[:2], 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    at_largest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - at_largest) // 255  # (B, C, 1)
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, values).view_as(images).to(torch.uint8)
    return torch.where((step > 0).unsqueeze(3), equalized, images)


def identity(images: Tensor, unused: Tensor) -> Tensor:
    """Return the images."""
    return images


@dataclass(frozen=True)
class Operation:
    """An operation on images and amounts ``(B,)``, and the amount at ``level`` 0..1.

    The amount is ``neutral + strength(level)``; signed ones add or subtract, at random.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    strength: Callable[[float], float]
    signed: bool = False
    neutral: float = 0.0


OPERATIONS: tuple[Operation, ...] = (
    Operation(identity, lambda level: 0.0),
    Operation(shear_x, lambda level: 0.3 * level, signed=True),
    Operation(shear_y, lambda level: 0.3 * level, signed=True),
    Operation(translate_x, lambda level: 150 / 331 * level, signed=True),
    Operation(translate_y, lambda level: 150 / 331 * level, signed=True),
    Operation(rotate, lambda level: 30 * level, signed=True),
    Operation(adjust_brightness, lambda level: 0.9 * level, signed=True, neutral=1.0),
    Operation(adjust_saturation, lambda level: 0.9 * level, signed=True, neutral=1.0),
    Operation(adjust_contrast, lambda level: 0.9 * level, signed=True, neutral=1.0),
    Operation(sharpen, lambda level: 0.9 * level, signed=True, neutral=1.0),
    Operation(posterize, lambda level: 8.0 - round(4 * level)),
    Operation(solarize, lambda level: 255 * (1 - level)),
    Operation(autocontrast, lambda level: 0.0),
    Operation(equalize, lambda level: 0.0),
)


@dataclass(frozen=True)
class RandAugment:
    """Apply ``num_ops`` operations, each drawn uniformly from ``OPERATIONS``, at one magnitude.

    ``magnitude`` counts 0..30; 30 is the strongest. PEMN's ConvMixer uses 2 operations at 12.
    """

    num_ops: int = 2
    magnitude: int = 12

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        for _ in range(self.num_ops):
            drawn = torch.randint(
                len(OPERATIONS), (len(images),), generator=generator, device=images.device
            )
            sign = (
                torch.randint(2, (len(images),), generator=generator, device=images.device) * 2 - 1
            )
            images = images.clone()
            for which, operation in enumerate(OPERATIONS):
                chosen = (drawn == which).nonzero().squeeze(1)
                if len(chosen) == 0:
                    continue
                strength = operation.strength(self.magnitude / 30)
                direction = sign[chosen] if operation.signed else torch.ones_like(chosen)
                amount = operation.neutral + strength * direction
                images[chosen] = operation.apply(images[chosen], amount)
        return images
