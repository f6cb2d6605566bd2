"""One model in training: a step, an epoch, and everything a checkpoint holds."""

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..nn import recompute_norms, select_together
from .augment import Normalize
from .data import ImageDataset, Splits, batch_lengths, batches, derived_seed, seeded_generator
from .evaluation import Score, Tally, evaluate
from .graphs import CudaGraphs
from .records import EpochRecord, best_record, current_masks, layer_stats
from .schedules import SCHEDULES
from .settings import AMP_DTYPES, Settings
from .usage import peak_memory, reset_peak_memory
from .world import World


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that require grad: scores, norms, dense weights.

    All are one group, so weight decay shrinks scores and norms too, as in PEMN's code.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # On CUDA one kernel for all of them, which looks for overflows of fp16 itself; the host would
    # wait for them.
    fused = True if trained and trained[0].is_cuda else None
    if settings.optimizer == "sgd":
        make: Any = partial(torch.optim.SGD, momentum=settings.momentum)
    else:
        make = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    optimizer: torch.optim.Optimizer = make(
        trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
    )
    return optimizer


def augmented_at_once(device: torch.device) -> int:
    """Return how many batches are augmented together. On a GPU augmentations are many small
    kernels, and they wait for it to find out which images they are for.
    """
    return 16 if device.type == "cuda" else 1


class Trainer:
    """A model, its optimizer and everything else that a checkpoint holds.

    What other processes have to do with it is `World`'s: it wraps the model (`__init__`), takes
    this process's share of a batch and its random numbers (`train_epoch`), gradients (`backward`),
    the sums (`Tally.score`) and whole states (`state_dict`).
    """

    def __init__(
        self,
        model: nn.Module,
        data: Splits,
        settings: Settings,
        identity: Mapping[str, Any],
        world: World | None = None,
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.world = world or World()
        self.identity = {**identity, "dataset": data.name, **settings.to_dict()}
        self.device = data.train.images.device
        self.normalize = Normalize(data.mean, data.std)
        if settings.channels_last:
            _convolutions_to_channels_last(model)
        self.wrapped = self.world.wrap(model)
        if settings.compile:
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        self.optimizer = make_optimizer(model, settings)
        self.amp_dtype = AMP_DTYPES[settings.amp]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.tally = Tally(self.device)
        self.graphs = self._make_graphs() if settings.cuda_graphs else None
        self.records: list[EpochRecord] = []
        self.best_weights: dict[str, Tensor] = {}
        reset_peak_memory(self.device)

    def _make_graphs(self) -> CudaGraphs:
        if self.device.type != "cuda" or self.world.size > 1:
            raise ValueError(
                f"cuda_graphs: got {self.world.size} x {self.device}, expected one CUDA device"
            )
        return CudaGraphs(self._gradients, self.model.parameters())

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.records)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        lengths = batch_lengths(len(self.data.train), self.settings.batch_size, self.world.size)
        return len(lengths)

    def train_epoch(self, progress: Callable[[int], object]) -> Score:
        """Pass over the training images once, telling ``progress`` how many each step took."""
        settings, world = self.settings, self.world
        schedule = SCHEDULES[settings.schedule]
        # The order is every process's; what augmentation and dropout draw is each one's own.
        key = (settings.seed, self.epoch)
        order = seeded_generator(*key, device=self.device)
        own = seeded_generator(*key, 1 + world.rank, device=self.device)
        torch.manual_seed(derived_seed(*key, 1 + world.rank, 1))
        self.tally.clear()
        self.model.train()
        gradients = self._gradients if self.graphs is None else self.graphs
        parts = batches(self.data.train, settings.batch_size, order, world.rank, world.size)
        for step, (inputs, labels, count) in enumerate(self._augmented(parts, own), 1):
            lr = schedule(self.epoch + step / self.steps, settings.epochs, settings.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            gradients(inputs, labels, count)
            self.update()
            progress(count)
        return self.tally.score(world)

    def _augmented(
        self, parts: Iterable[tuple[ImageDataset, int]], generator: Generator
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Inputs, labels and image count of each batch."""
        parts = iter(parts)
        while some := list(itertools.islice(parts, augmented_at_once(self.device))):
            images = torch.cat([batch.images for batch, _ in some])
            images = self.settings.augment(images, generator)
            inputs = self.settings.erase(self.normalize(images), generator)
            split = inputs.split([len(batch) for batch, _ in some])
            for part, (batch, count) in zip(split, some, strict=True):
                yield part, batch.labels, count

    def _gradients(self, inputs: Tensor, labels: Tensor, count: int) -> None:
        """`backward` with all masks selected at once."""
        # Under torch.compile each forward selects, as masks from outside are new in every step.
        together = (
            contextlib.nullcontext() if self.settings.compile else select_together(self.model)
        )
        with together:
            self.backward(inputs, labels, count)

    def backward(self, inputs: Tensor, labels: Tensor, count: int) -> None:
        """Add the gradient of the mean loss over ``count`` images, of which these are this
        process's, in ``accumulate`` pieces, and their score to the tally.
        """
        # As many on every process, whose shares differ by one image: a piece may be a collective.
        pieces = min(self.settings.accumulate, count // self.world.size)
        split = zip(inputs.tensor_split(pieces), labels.tensor_split(pieces), strict=True)
        for piece, (x, y) in enumerate(split, 1):
            if self.settings.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            keeping = recompute_norms if self.settings.recompute_norms else contextlib.nullcontext
            with self.world.backward(self.wrapped, last=piece == pieces):
                # No cast serves twice, and a CUDA graph must not read one from before.
                cast = torch.autocast(
                    self.device.type,
                    self.amp_dtype,
                    enabled=self.amp_dtype is not None,
                    cache_enabled=False,
                )
                with keeping(), cast:
                    logits = self.wrapped(x)
                    loss = F.cross_entropy(logits, y, reduction="sum")
                # The world takes the mean over its processes of what each one adds here.
                self.scaler.scale(loss * (self.world.size / count)).backward()
            self.tally.add(loss, logits, y)

    def update(self) -> None:
        """Clip the gradient if asked to, step, and clear it."""
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def run_epoch(self, progress: Callable[[int], object]) -> EpochRecord:
        """Train for an epoch, validate, and remember the weights if they are the best so far."""
        start = time.perf_counter()
        masks = current_masks(self.model)
        train = self.train_epoch(progress)
        seconds = time.perf_counter() - start
        self.world.settle(self.model)
        val = evaluate(self.model, self.data.val, self.normalize, world=self.world)
        record: EpochRecord = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "seconds": seconds,
            "step_seconds": seconds / self.steps,
            "images_per_second": len(self.data.train) / seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "layers": layer_stats(self.model, masks),
        }
        self.records.append(record)
        if record is best_record(self.records):
            self.best_weights = copy.deepcopy(self.world.model_state(self.model))
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, whole on the main process: tensors, numbers, strings and
        containers of them.
        """
        return {
            "identity": self.identity,
            "model": self.world.model_state(self.model),
            "optimizer": self.world.optimizer_state(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "records": self.records,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, given on every process.

        Raises:
            ValueError: it was made with other settings; names them.
        """
        then = state["identity"]
        changed = [
            f"{key} was {then.get(key)}, is {now}"
            for key, now in self.identity.items()
            if then.get(key) != now
        ]
        if changed:
            raise ValueError(f"cannot resume a run of other settings: {'; '.join(changed)}")
        self.world.load_model_state(self.model, state["model"])
        self.world.load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.records = state["records"]
        self.best_weights = state["best_weights"] if self.world.is_main else {}

    def take_best_weights(self) -> None:
        """Give the model the weights of its best epoch."""
        best = self.world.from_main(lambda: self.best_weights)
        self.world.load_model_state(self.model, best)


def _convolutions_to_channels_last(model: nn.Module) -> None:
    """Masked layers stay as they are: their scores are ranked row by row."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
