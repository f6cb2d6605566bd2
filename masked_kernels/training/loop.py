"""Train, evaluate, and fit with a log, checkpoints and exact resume.

`fit` keeps three files in its folder: ``checkpoint.pt``, replaced atomically after every epoch;
``log.jsonl``, one line an epoch; ``curves.png``. The checkpoint is the truth: a resumed run
rewrites the log from it. What an epoch does depends on the state after the last one and on
``(seed, epoch)`` alone, so a run that was killed ends with the same bits as one that was not,
on the same device with the same number of threads.
"""

import copy
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .augment import Normalize
from .checkpoint import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    write_atomically,
)
from .curves import plot_curves
from .data import ImageDataset, Splits, batches, seeded_generator
from .records import EpochRecord, best_record, current_masks, layer_stats
from .schedules import SCHEDULES
from .settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy 0..1 over some images."""

    loss: float
    accuracy: float


class Tally:
    """Sums loss and hits on the device, so that a step does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        hits = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss.detach().double() * len(labels), hits.double()])
        self.count += len(labels)

    def score(self) -> Score:
        loss, accuracy = (self.sums / self.count).tolist()
        return Score(loss, accuracy)


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, normalize: Normalize, batch_size: int = 512
) -> Tensor:
    """Return logits ``(N, classes)`` for uint8 images ``(N, C, H, W)``, in eval mode."""
    was_training = model.training
    model.eval()
    logits = [model(normalize(part)) for part in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(logits)


def evaluate(
    model: nn.Module, dataset: ImageDataset, normalize: Normalize, batch_size: int = 512
) -> Score:
    """Return the model's score on ``dataset``."""
    logits = predict(model, dataset.images, normalize, batch_size)
    tally = Tally(logits.device)
    tally.add(F.cross_entropy(logits, dataset.labels), logits, dataset.labels)
    return tally.score()


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that require grad: scores, norms, dense weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    lr, weight_decay = settings.lr, settings.weight_decay
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        case "adam":
            return torch.optim.Adam(trained, lr=lr, weight_decay=weight_decay)
        case "sgd":
            return torch.optim.SGD(
                trained, lr=lr, weight_decay=weight_decay, momentum=settings.momentum
            )


class Trainer:
    """A model, its optimizer and everything else that a checkpoint holds."""

    def __init__(
        self, model: nn.Module, data: Splits, settings: Settings, identity: Mapping[str, Any]
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.identity = {**identity, "dataset": data.name, **settings.to_dict()}
        self.device = data.train.images.device
        self.normalize = Normalize(data.mean, data.std)
        self.optimizer = make_optimizer(model, settings)
        self.half = settings.half and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.records: list[EpochRecord] = []
        self.best_weights: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.records)

    def train_epoch(self, progress: "tqdm[Any]") -> Score:
        """Pass over the training images once, advancing ``progress`` by images."""
        settings = self.settings
        schedule = SCHEDULES[settings.schedule]
        generator = seeded_generator(settings.seed, self.epoch, device=self.device)
        steps = -(-len(self.data.train) // settings.batch_size)
        tally = Tally(self.device)
        self.model.train()
        for step, batch in enumerate(batches(self.data.train, settings.batch_size, generator), 1):
            lr = schedule(self.epoch + step / steps, settings.epochs, settings.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.train_step(batch, generator, tally)
            progress.update(len(batch))
        return tally.score()

    def train_step(self, batch: ImageDataset, generator: Generator, tally: Tally) -> None:
        """Update the model on one batch and add its score to the tally."""
        inputs = self.normalize(self.settings.augment(batch.images, generator))
        inputs = self.settings.erase(inputs, generator)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, batch.labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        tally.add(loss, logits, batch.labels)

    def run_epoch(self, progress: "tqdm[Any]") -> EpochRecord:
        """Train for an epoch, validate, and remember the weights if they are the best so far."""
        start = time.perf_counter()
        masks = current_masks(self.model)
        train = self.train_epoch(progress)
        seconds = time.perf_counter() - start
        val = evaluate(self.model, self.data.val, self.normalize)
        record: EpochRecord = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            "seconds": seconds,
            "images_per_second": len(self.data.train) / seconds,
            "layers": layer_stats(masks, current_masks(self.model)),
        }
        self.records.append(record)
        if record is best_record(self.records):
            self.best_weights = copy.deepcopy(self.model.state_dict())
        return record

    def state_dict(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "records": self.records,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

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
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        restore_random_state(state["random"])
        self.records = state["records"]
        self.best_weights = state["best_weights"]


def fit(
    model: nn.Module,
    data: Splits,
    settings: Settings,
    folder: Path,
    *,
    identity: Mapping[str, Any] = MappingProxyType({}),
    resume: bool = False,
    progress: bool = True,
) -> list[EpochRecord]:
    """Train ``model`` in place; it ends up with the weights of its best validation accuracy.

    Among epochs of equal accuracy the one of lower loss counts as better.

    Args:
        model: on the device of ``data``.
        folder: where the log, the curves and the checkpoint go; made if need be.
        identity: plain values that, beside settings and dataset, tell this run from others (say
            the model's arguments); a resume with different ones is refused.
        resume: continue from the folder's checkpoint if there is one, else start.
        progress: show a bar on standard error, if that is a terminal.

    Returns:
        The records of all epochs, those before a resume included.

    Raises:
        FileExistsError: the folder has a checkpoint and ``resume`` is False.
        ValueError: the checkpoint was made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, lines = folder / "checkpoint.pt", folder / "log.jsonl"
    trainer = Trainer(model, data, settings, identity)
    if checkpoint.exists():
        if not resume:
            raise FileExistsError(f"{checkpoint} exists: resume, or choose another folder")
        trainer.load_state_dict(load_checkpoint(checkpoint))
        log.info("resumed after epoch %d of %d", trainer.epoch, settings.epochs)
    write_atomically(lines, lambda file: file.writelines(map(_json_line, trainer.records)))

    total = settings.epochs * len(data.train)
    done = trainer.epoch * len(data.train)
    # disable=None shows the bar on a terminal only; in a file the log lines say enough.
    bar = tqdm(
        total=total, initial=done, unit="img", disable=None if progress else True, leave=False
    )
    with logging_redirect_tqdm([logging.getLogger()]), bar:
        while trainer.epoch < settings.epochs:
            bar.set_description(f"epoch {trainer.epoch + 1}/{settings.epochs}")
            record = trainer.run_epoch(bar)
            save_checkpoint(checkpoint, trainer.state_dict())
            with lines.open("ab") as file:
                file.write(_json_line(record))
            log.info(
                "epoch %d/%d: loss %.3f, validation accuracy %.1f %%, %.0f images/s",
                record["epoch"],
                settings.epochs,
                record["train_loss"],
                100 * record["val_accuracy"],
                record["images_per_second"],
            )
    plot_curves(trainer.records, folder / "curves.png")
    model.load_state_dict(trainer.best_weights)
    return trainer.records


def _json_line(record: EpochRecord) -> bytes:
    return json.dumps(record).encode() + b"\n"
