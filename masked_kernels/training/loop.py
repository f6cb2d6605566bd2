"""`fit`: train with a log, checkpoints and exact resume.

It keeps three files in its folder: ``checkpoint.pt``, replaced atomically after every epoch;
``log.jsonl``, one line an epoch; ``curves.png``. The checkpoint is the truth: a resumed run
rewrites the log from it. What an epoch does depends on the state after the last one and on
``(seed, epoch)`` alone, dropout included, so a run that was killed ends with the same bits as one
that was not, on the same device with the same number of threads.

Where several processes come in, each at one place: `World` wraps the model, makes gradients equal,
adds up tallies and gathers whole states; `batches` takes a process's share of a batch and
`evaluate` of the images; `Trainer.update` is the only step of the optimizer; `RunFiles` is the only
writer, and only where ``world.is_main``.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .data import Splits
from .records import EpochRecord
from .run_files import RunFiles
from .settings import Settings
from .trainer import Trainer
from .world import World

log = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    data: Splits,
    settings: Settings,
    folder: Path,
    *,
    identity: Mapping[str, Any] = MappingProxyType({}),
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    world: World | None = None,
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
        tensorboard: write ``tensorboard/`` too; needs the extra of that name.
        world: the processes that train together; None for this one alone.

    Returns:
        The records of all epochs, those before a resume included.

    Raises:
        FileExistsError: the folder has a checkpoint and ``resume`` is False.
        ValueError: the checkpoint is damaged, or was made with other settings.
        ImportError: a package of an extra is missing; names it.
    """
    world = world or World()
    files = RunFiles(folder, world.is_main, tensorboard)
    state = files.open(resume)
    trainer = Trainer(model, data, settings, identity, world)
    if state is not None:
        trainer.load_state_dict(state)
        log.info("resumed after epoch %d of %d", trainer.epoch, settings.epochs)
    files.begin(trainer.records)

    total = settings.epochs * len(data.train)
    done = trainer.epoch * len(data.train)
    # disable=None shows the bar on a terminal only; in a file the log lines say enough.
    hidden = None if progress and world.is_main else True
    bar = tqdm(total=total, initial=done, unit="img", disable=hidden, leave=False)
    with logging_redirect_tqdm([logging.getLogger()]), bar:
        while trainer.epoch < settings.epochs:
            bar.set_description(f"epoch {trainer.epoch + 1}/{settings.epochs}")
            record = trainer.run_epoch(bar.update)
            files.add(record, trainer.state_dict())
            log.info(
                "epoch %d/%d: loss %.3f, validation accuracy %.1f %%, %.0f images/s",
                record["epoch"],
                settings.epochs,
                record["train_loss"],
                100 * record["val_accuracy"],
                record["images_per_second"],
            )
    files.finish(trainer.records)
    trainer.take_best_weights()
    return trainer.records
