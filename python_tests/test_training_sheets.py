"""Datasets packed as WebP sheets: exact, complete, and refused where they are not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from masked_kernels.training import load_splits, sheets
from masked_kernels.training.sources import ImageArrays

PACK = Path(__file__).parents[1] / "examples" / "pack_images.py"


@pytest.fixture
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets, "COLUMNS", 4)
    monkeypatch.setattr(sheets, "ROWS", 5)


def random_images(count: int, channels: int, classes: int = 10) -> ImageArrays:
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, channels, 8, 6), dtype=np.uint8)
    return ImageArrays(images, np.arange(count) % classes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 20, 33])  # less than a row, a full sheet, part of a second
@pytest.mark.usefixtures("small_sheets")
def test_sheets_come_back_bit_for_bit(tmp_path: Path, channels: int, count: int) -> None:
    parts = random_images(count, channels), random_images(7, channels)
    sheets.write_sheets("cifar10", parts, tmp_path / "sheets")
    for written, read in zip(
        parts, sheets.read_sheets("cifar10", tmp_path / "sheets"), strict=True
    ):
        np.testing.assert_array_equal(read.images, written.images)
        np.testing.assert_array_equal(read.labels, written.labels)


@pytest.mark.usefixtures("small_sheets")
def test_a_run_takes_sheets_for_the_dataset(tmp_path: Path) -> None:
    train, test = random_images(100, 3, 100), random_images(7, 3)
    sheets.write_sheets("cifar100", (train, test), tmp_path / "sheets")
    splits = load_splits("cifar100", tmp_path / "sheets", val_size=0)
    np.testing.assert_array_equal(splits.test.images.numpy(), test.images)
    assert sorted(splits.train.labels.tolist()) == list(range(100))


def test_the_example_packs_a_dataset_once(tmp_path: Path) -> None:
    command = [sys.executable, str(PACK), "digits", str(tmp_path), str(tmp_path / "sheets")]
    packed = subprocess.run(command, capture_output=True, text=True)
    assert packed.returncode == 0, packed.stderr
    assert "read back and equal" in packed.stdout
    train, test = sheets.read_sheets("digits", tmp_path / "sheets")
    assert train.images.shape == (1797, 1, 8, 8)
    assert test is None
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "choose another folder" in again.stderr


@pytest.mark.usefixtures("small_sheets")
def test_what_is_wrong_with_sheets_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "sheets"
    sheets.write_sheets("cifar10", (random_images(30, 3), None), folder)
    with pytest.raises(ValueError, match="holds cifar10, expected cifar100"):
        sheets.read_sheets("cifar100", folder)

    with Image.open(folder / "train-1.webp") as picture:
        pixels = np.array(picture)
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "train-1.webp", lossless=True)
    with pytest.raises(ValueError, match=r"train-1\.webp: SHA-256 of its pixels"):
        sheets.read_sheets("cifar10", folder)
    Image.fromarray(pixels[:-1]).save(folder / "train-1.webp", lossless=True)
    with pytest.raises(ValueError, match="do not hold 10 images"):
        sheets.read_sheets("cifar10", folder)
    (folder / "train-1.webp").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-1\.webp is missing"):
        sheets.read_sheets("cifar10", folder)


def test_an_interrupted_write_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_space(text: Path, content: str) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_text", out_of_space)
    with pytest.raises(OSError, match="no space"):
        sheets.write_sheets("cifar10", (random_images(3, 3), None), tmp_path / "sheets")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_sheets")
def test_manifest_names_the_sheets(tmp_path: Path) -> None:
    sheets.write_sheets("cifar10", (random_images(33, 3), random_images(2, 3)), tmp_path / "sheets")
    manifest = json.loads((tmp_path / "sheets" / "sheets.json").read_text())
    named = [sheet["file"] for part in manifest["parts"].values() for sheet in part["sheets"]]
    assert named == ["train-0.webp", "train-1.webp", "test-0.webp"]
