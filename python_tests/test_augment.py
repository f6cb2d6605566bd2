"""Augmentations against cases worked by hand, on images small enough to write down."""

import math

import pytest
import torch
from torch import Generator, Tensor

from masked_kernels.training.augment import (
    ColorJitter,
    Compose,
    HorizontalFlip,
    Normalize,
    RandomCrop,
    RandomErasing,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
)
from masked_kernels.training.randaugment import (
    OPERATIONS,
    RandAugment,
    autocontrast,
    equalize,
    posterize,
    rotate,
    sharpen,
    shear_x,
    shear_y,
    solarize,
    translate_x,
    translate_y,
)


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def image(*rows: list[int]) -> Tensor:
    """One image of one channel, uint8 (1, 1, H, W)."""
    return torch.tensor(rows, dtype=torch.uint8)[None, None]


def amount(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


SQUARE = image([1, 2, 3], [4, 5, 6], [7, 8, 9])
RGB = torch.tensor([100, 50, 200], dtype=torch.uint8).view(1, 3, 1, 1)


def test_flip_mirrors_columns_always_never_or_for_about_half() -> None:
    mirrored = image([3, 2, 1], [6, 5, 4], [9, 8, 7])
    assert torch.equal(HorizontalFlip(1.0)(SQUARE, generator()), mirrored)
    assert torch.equal(HorizontalFlip(0.0)(SQUARE, generator()), SQUARE)
    many = HorizontalFlip(0.5)(SQUARE.expand(1000, -1, -1, -1), generator())
    flipped = (many == mirrored).all(dim=(1, 2, 3)).sum()
    assert 440 < flipped < 560  # nearly four standard deviations of 15.8


def test_crop_is_a_window_of_the_padded_image_and_takes_each_position() -> None:
    crops = RandomCrop(1)(SQUARE.expand(400, -1, -1, -1), generator())
    padded = torch.zeros(5, 5, dtype=torch.uint8)
    padded[1:4, 1:4] = SQUARE[0, 0]
    windows = {
        tuple(padded[top : top + 3, left : left + 3].flatten().tolist())
        for top in range(3)
        for left in range(3)
    }
    assert {tuple(crop.flatten().tolist()) for crop in crops} == windows


def test_crop_keeps_channels_together() -> None:
    images = torch.cat([SQUARE, SQUARE + 100, SQUARE + 200], dim=1).expand(50, -1, -1, -1)
    crops = RandomCrop(2)(images, generator())
    inside = crops[:, 0] > 0
    assert torch.equal(crops[:, 1], torch.where(inside, crops[:, 0] + 100, 0))
    assert torch.equal(crops[:, 2], torch.where(inside, crops[:, 0] + 200, 0))


def test_adjustments_of_one_pixel() -> None:
    # Luma of (100, 50, 200): 29.9 + 29.35 + 22.8 = 82.05.
    bright = adjust_brightness(RGB, amount(1.5)).flatten()
    assert bright.tolist() == [150, 75, 255]  # 300 is cut to 255
    gray = adjust_saturation(RGB, amount(0.0)).flatten()
    assert gray.tolist() == [82, 82, 82]
    half = adjust_saturation(RGB, amount(0.5)).flatten()
    assert half.tolist() == [91, 66, 141]  # halfway to 82.05, fractions cut
    pair = image([0, 200])
    assert adjust_contrast(pair, amount(0.5)).flatten().tolist() == [50, 150]
    assert adjust_contrast(pair, amount(1.0)).flatten().tolist() == [0, 200]


def test_jitter_draws_for_each_image_and_stays_in_range() -> None:
    images = torch.full((200, 3, 2, 2), 100, dtype=torch.uint8)
    jittered = ColorJitter(0.2, 0.0, 0.0)(images, generator())[:, 0, 0, 0].double()
    assert jittered.min() >= 79 and jittered.max() <= 120
    assert len(jittered.unique()) > 30
    assert torch.equal(ColorJitter(0, 0, 0)(images, generator()), images)


def test_normalize_by_hand() -> None:
    out = Normalize((0.5, 0.0, 1.0), (0.5, 1.0, 2.0))(
        torch.tensor([255, 51, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    )
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == pytest.approx([1.0, 0.2, -0.5])


def test_erasing_cuts_one_rectangle_of_the_stated_area_and_shape() -> None:
    images = torch.ones(300, 2, 32, 32)
    erased = RandomErasing(p=1.0)(images, generator())
    assert torch.equal(erased[:, 0], erased[:, 1])
    for hole in erased[:, 0] == 0:
        rows, cols = hole.any(dim=1), hole.any(dim=0)
        height, width = int(rows.sum()), int(cols.sum())
        assert int(hole.sum()) == height * width  # a full rectangle
        # Rounding moves each side by at most half a pixel.
        assert (height - 0.5) * (width - 0.5) <= 0.33 * 1024
        assert (height + 0.5) * (width + 0.5) >= 0.02 * 1024
        assert (height - 0.5) / (width + 0.5) <= 3.3
        assert (height + 0.5) / (width - 0.5) >= 0.3


def test_erasing_probability_and_image_without_room() -> None:
    holes = (RandomErasing(p=0.2)(torch.ones(1000, 1, 8, 8), generator()) == 0).any(dim=(1, 2, 3))
    assert 150 < holes.sum() < 250  # four standard deviations of 12.6
    tiny = torch.ones(4, 1, 1, 1)
    assert torch.equal(RandomErasing(p=1.0)(tiny, generator()), tiny)


def test_shears_and_translations_move_pixels_by_hand() -> None:
    # Output (x, y) comes from (x + 0.5 y, y): centre rows y = 0.5, 1.5, 2.5 look 0.25, 0.75, 1.25
    # to the right, which rounds to columns +0, +1, +1.
    assert torch.equal(shear_x(SQUARE, amount(0.5)), image([1, 2, 3], [5, 6, 0], [8, 9, 0]))
    assert torch.equal(shear_y(SQUARE, amount(0.5)), image([1, 5, 6], [4, 8, 9], [7, 0, 0]))
    # 0.4 * 3 = 1.2 pixels, cut to 1.
    assert torch.equal(translate_x(SQUARE, amount(0.4)), image([2, 3, 0], [5, 6, 0], [8, 9, 0]))
    assert torch.equal(translate_y(SQUARE, amount(-0.4)), image([0, 0, 0], [1, 2, 3], [4, 5, 6]))


def test_rotation_by_a_quarter_turn_is_about_the_centre() -> None:
    quarter = rotate(SQUARE, amount(90))
    assert torch.equal(quarter, torch.rot90(SQUARE, -1, dims=(2, 3)))
    assert torch.equal(rotate(SQUARE, amount(0)), SQUARE)


def test_each_image_of_a_batch_moves_by_its_own_amount() -> None:
    moved = translate_x(SQUARE.expand(2, -1, -1, -1), amount(0.4, 0))
    assert torch.equal(moved[:1], translate_x(SQUARE, amount(0.4)))
    assert torch.equal(moved[1:], SQUARE)


def test_sharpen_keeps_the_border_and_blends_the_middle() -> None:
    spot = image([0, 0, 0], [0, 130, 0], [0, 0, 0])
    smooth = image([0, 0, 0], [0, 50, 0], [0, 0, 0])  # 130 * 5 / 13
    assert torch.equal(sharpen(spot, amount(0.0)), smooth)
    assert torch.equal(sharpen(spot, amount(1.0)), spot)
    assert sharpen(spot, amount(1.5))[0, 0, 1, 1] == 170  # 50 + 1.5 * 80


def test_posterize_and_solarize() -> None:
    values = image([0, 15, 16, 127, 128, 255])
    assert posterize(values, amount(4)).flatten().tolist() == [0, 0, 16, 112, 128, 240]
    assert posterize(values, amount(8)).flatten().tolist() == values.flatten().tolist()
    assert solarize(values, amount(128)).flatten().tolist() == [0, 15, 16, 127, 127, 0]


def test_autocontrast_stretches_and_keeps_constant_channels() -> None:
    none = amount(0)
    assert autocontrast(image([50, 100, 150]), none).flatten().tolist() == [0, 127, 255]
    assert autocontrast(image([7, 7]), none).flatten().tolist() == [7, 7]


def test_equalize_by_hand() -> None:
    # 1020 pixels: 255 each of 10, 20, 30, 40. step = (1020 - 255) // 255 = 3, so v becomes
    # (pixels below v + 1) // 3: 1 // 3, 256 // 3, 511 // 3, 766 // 3.
    values = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).repeat(255).view(1, 1, 4, 255)
    table = dict(zip((10, 20, 30, 40), (0, 85, 170, 255), strict=True))
    expected = [table[v] for v in values.flatten().tolist()]
    assert equalize(values, amount(0)).flatten().tolist() == expected
    assert torch.equal(equalize(SQUARE, amount(0)), SQUARE)  # too few pixels: step 0


def test_magnitude_12_has_the_published_strengths() -> None:
    at = {operation.apply.__name__: operation.strength(12 / 30) for operation in OPERATIONS}
    assert at["rotate"] == pytest.approx(12.0)  # degrees
    assert at["shear_x"] == pytest.approx(0.12)
    assert at["translate_y"] * 32 == pytest.approx(5.80, abs=0.01)  # pixels
    assert at["adjust_brightness"] == pytest.approx(0.36)
    assert at["posterize"] == 6  # bits
    assert at["solarize"] == pytest.approx(153.0)
    assert len(OPERATIONS) == 14


def test_randaugment_applies_each_operation_equally_often_and_to_its_image_only() -> None:
    images = torch.randint(256, (2800, 3, 8, 8), dtype=torch.uint8, generator=generator(1))
    out = RandAugment(num_ops=1, magnitude=30)(images, generator())
    again = RandAugment(num_ops=1, magnitude=30)(images, generator())
    assert torch.equal(out, again)
    # Autocontrast, equalize and identity hardly move such noise; rotation moves nearly all of it.
    unchanged = (out == images).all(dim=(1, 2, 3)).sum()
    assert 140 < unchanged < 1000
    zero = RandAugment(num_ops=0)(images, generator())
    assert torch.equal(zero, images)


def test_randaugment_ignores_the_other_images_of_the_batch() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator(1))
    changed = images.clone()
    changed[0] = 255 - changed[0]
    augment = RandAugment(num_ops=2, magnitude=12)
    left, right = augment(images, generator()), augment(changed, generator())
    assert torch.equal(left[1:], right[1:])


def test_compose_runs_in_order_from_one_generator() -> None:
    composed = Compose((RandomCrop(1), HorizontalFlip()))
    state = generator(3)
    expected = HorizontalFlip()(RandomCrop(1)(SQUARE, state), state)
    assert torch.equal(composed(SQUARE, generator(3)), expected)
    assert math.prod(expected.shape) == 9
