"""A dataset packed without loss, to carry to a machine without network: WebP sheets of images.

``examples/pack_images.py`` writes them, and ``load_splits`` reads them in place of the dataset's
own files. ``sheets.json`` holds the labels and a checksum of every sheet's pixels, which reading
verifies.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .sources import SOURCES, ImageArrays, TrainTest

MANIFEST = "sheets.json"
COLUMNS, ROWS = 100, 100
"""Of a full sheet. In two dimensions, since WebP predicts pixels from those above too."""

Pixels = npt.NDArray[np.uint8]


def write_sheets(dataset: str, parts: TrainTest, folder: Path) -> None:
    """Write training and test images, uint8 ``(N, 1 or 3, H, W)``, into a new ``folder``.

    It appears only when it is complete.

    Raises:
        FileExistsError: there is such a folder.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch, "sheets")
        new.mkdir()
        manifest = {
            "dataset": dataset,
            "parts": {
                name: None if part is None else _write_part(name, part, new)
                for name, part in zip(("train", "test"), parts, strict=True)
            },
        }
        (new / MANIFEST).write_text(json.dumps(manifest))
        new.rename(folder)


def read_sheets(dataset: str, folder: Path) -> TrainTest:
    """Read what ``write_sheets`` wrote.

    Raises:
        FileNotFoundError: a sheet is missing; names it.
        ValueError: the folder holds another dataset, or a sheet other pixels.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["dataset"] != dataset:
        raise ValueError(f"{folder} holds {manifest['dataset']}, expected {dataset}")
    classes = len(SOURCES[dataset].classes)
    train, test = (manifest["parts"][name] for name in ("train", "test"))
    return (
        _read_part(train, folder, classes),
        None if test is None else _read_part(test, folder, classes),
    )


def _write_part(name: str, part: ImageArrays, folder: Path) -> dict[str, Any]:
    sheets = []
    for number, images in enumerate(_sheets_of(part.images)):
        file = f"{name}-{number}.webp"
        _write_sheet(images, folder / file)
        sheets.append({"file": file, "shape": images.shape, "sha256": _digest(images)})
    return {"labels": part.labels.tolist(), "sheets": sheets}


def _read_part(part: dict[str, Any], folder: Path, classes: int) -> ImageArrays:
    images = [_read_sheet(folder / sheet["file"], sheet) for sheet in part["sheets"]]
    origin = str(folder / MANIFEST)
    return ImageArrays.checked(np.concatenate(images), part["labels"], origin, classes)


def _sheets_of(images: Pixels) -> Iterator[Pixels]:
    for begin in range(0, len(images), COLUMNS * ROWS):
        yield images[begin : begin + COLUMNS * ROWS]


def _write_sheet(images: Pixels, path: Path) -> None:
    from PIL import Image

    count, _, height, width = images.shape
    rows = -(-count // COLUMNS)
    grid = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    grid[:count] = images.transpose(0, 2, 3, 1)  # a grey image's channel fills all three
    grid = grid.reshape(rows, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
    sheet = np.ascontiguousarray(grid.reshape(rows * height, COLUMNS * width, 3))
    Image.fromarray(sheet).save(path, lossless=True, quality=50, method=2)


def _read_sheet(path: Path, sheet: dict[str, Any]) -> Pixels:
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, one of the sheets that {MANIFEST} names")
    count, channels, height, width = sheet["shape"]
    rows = -(-count // COLUMNS)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    if pixels.shape != (rows * height, COLUMNS * width, 3):
        raise ValueError(f"{path}: {pixels.shape[:2]} pixels do not hold {count} images")
    grid = pixels.reshape(rows, height, COLUMNS, width, 3).transpose(0, 2, 4, 1, 3)
    images = np.ascontiguousarray(grid.reshape(-1, 3, height, width)[:count, :channels])
    if (found := _digest(images)) != sheet["sha256"]:
        raise ValueError(f"{path}: SHA-256 of its pixels is {found}, expected {sheet['sha256']}")
    return images


def _digest(images: Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
