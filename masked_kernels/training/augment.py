"""Augmentations of whole batches on any device, each image drawing its own parameters.

A transform is called with images and a generator on the images' device and returns new images;
it holds no state, so equal generators give equal results. Pixel transforms take and return uint8
``(B, C, H, W)``; ``Normalize`` makes floats of them and ``RandomErasing`` follows it.
Probabilities, ranges and the order of drawing parameters follow the papers' use of torchvision;
the random numbers are not torchvision's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Transform = Callable[[Tensor, Generator], Tensor]


def uniform(count: int, generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw float32 ``(count,)`` from [low, high) on the generator's device."""
    drawn = torch.rand(count, generator=generator, device=generator.device)
    return low + (high - low) * drawn


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Mix ``other + factor * (images - other)``: 0 gives ``other``, 1 ``images``, 2 goes beyond.

    Args:
        images: uint8 ``(B, C, H, W)``.
        other: float, broadcastable to images, values 0..255.
        factor: float ``(B,)``.
    """
    mixed = other + factor.view(-1, 1, 1, 1) * (images - other)
    return mixed.clamp_(0, 255).to(torch.uint8)


def grayscale(images: Tensor) -> Tensor:
    """Return the luma 0.299 R + 0.587 G + 0.114 B as float ``(B, 1, H, W)``."""
    if images.shape[1] == 1:
        return images.float()
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    return (images * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black."""
    return blend(images, torch.zeros((), device=images.device), factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale towards the image's mean luma."""
    return blend(images, grayscale(images).mean(dim=(2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale towards the image's luma; leaves one-channel images alone."""
    return blend(images, grayscale(images), factor)


@dataclass(frozen=True)
class Compose:
    """Apply transforms in order."""

    transforms: tuple[Transform, ...]

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        for transform in self.transforms:
            images = transform(images, generator)
        return images


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability ``p``."""

    p: float = 0.5

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        flip = uniform(len(images), generator) < self.p
        return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


@dataclass(frozen=True)
class RandomCrop:
    """Pad with ``padding`` black pixels on each side, then cut the original size anywhere."""

    padding: int = 4

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        count, _, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        corners = torch.randint(
            0, 2 * self.padding + 1, (2, count), generator=generator, device=images.device
        )
        rows = corners[0, :, None] + torch.arange(height, device=images.device)  # (B, H)
        cols = corners[1, :, None] + torch.arange(width, device=images.device)  # (B, W)
        image = torch.arange(count, device=images.device)[:, None, None]
        # Indexing the middle dimension away and back: (B, H, W, C) to (B, C, H, W).
        return padded[image, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast and saturation by factors from [1 - x, 1 + x], in random order.

    On one channel saturation does nothing.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        count = len(images)
        adjustments = (
            (adjust_brightness, uniform(count, generator, -1, 1) * self.brightness + 1),
            (adjust_contrast, uniform(count, generator, -1, 1) * self.contrast + 1),
            (adjust_saturation, uniform(count, generator, -1, 1) * self.saturation + 1),
        )
        keys = torch.rand(count, 3, generator=generator, device=images.device)
        for turn in keys.argsort(dim=1).unbind(1):  # turn: which adjustment comes now, (B,)
            images = images.clone()
            for which, (adjust, factor) in enumerate(adjustments):
                chosen = (turn == which).nonzero().squeeze(1)
                images[chosen] = adjust(images[chosen], factor[chosen])
        return images


@dataclass(frozen=True)
class Normalize:
    """Turn uint8 images into float32 ``(x / 255 - mean) / std``, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class RandomErasing:
    """Set a random rectangle of a normalised image to 0 with probability ``p``.

    Its area is a share of the image's from ``scale``; its height over width is log-uniform in
    ``ratio``. Ten candidates are drawn and the first that fits is used; if none fits the image is
    kept (Zhong et al. 2020, algorithm 1).
    """

    p: float = 0.2
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        count, _, height, width = images.shape
        area = uniform(10 * count, generator, *self.scale).view(count, 10) * (height * width)
        low, high = torch.tensor(self.ratio).log().tolist()
        ratio = uniform(10 * count, generator, low, high).exp().view(count, 10)
        tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)
        tall, wide = tall.gather(1, first), wide.gather(1, first)  # (B, 1)
        top = (uniform(count, generator)[:, None] * (height - tall + 1)).floor()
        left = (uniform(count, generator)[:, None] * (width - wide + 1)).floor()
        erase = (uniform(count, generator)[:, None] < self.p) & fits.any(dim=1, keepdim=True)
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        rows = (y >= top) & (y < top + tall) & erase  # (B, H)
        cols = (x >= left) & (x < left + wide)  # (B, W)
        return images.masked_fill((rows[:, :, None] & cols[:, None, :]).unsqueeze(1), 0.0)
