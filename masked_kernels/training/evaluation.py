"""Loss and accuracy of a model on images."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import select_together
from .augment import Normalize
from .data import ImageDataset
from .world import World


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy 0..1 over some images."""

    loss: float
    accuracy: float


class Tally:
    """Sums loss and hits on the device, so that a step does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, hits, images

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add images by the sum of their losses (0-d) and their logits ``(N, classes)``."""
        hits = (logits.argmax(dim=1) == labels).sum().double()
        count = torch.full_like(hits, len(labels))
        self.sums += torch.stack([loss.detach().double(), hits, count])

    def clear(self) -> None:
        """Forget all images."""
        self.sums.zero_()

    def score(self, world: World) -> Score:
        """Return the means over the images of all processes; all of them call this."""
        loss, hits, count = world.sum(self.sums).tolist()
        return Score(loss / count, hits / count)


def predict(
    model: nn.Module, images: Tensor, normalize: Normalize, batch_size: int = 512
) -> Tensor:
    """Return logits ``(N, classes)`` for uint8 images ``(N, C, H, W)``, in eval mode."""
    with _in_eval_mode(model):
        return torch.cat([model(normalize(part)) for part in images.split(batch_size)])


def evaluate(
    model: nn.Module,
    dataset: ImageDataset,
    normalize: Normalize,
    batch_size: int = 512,
    world: World | None = None,
) -> Score:
    """Return the model's score on ``dataset``, each process of the world seeing its share."""
    world = world or World()
    tally = Tally(dataset.images.device)
    with _in_eval_mode(model):
        for batch in dataset.split(batch_size * world.size):
            share = batch.share(world.rank, world.size)
            logits = model(normalize(share.images))
            loss = F.cross_entropy(logits, share.labels, reduction="sum")
            tally.add(loss, logits, share.labels)
    return tally.score(world)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients and with one selection for all batches, as the scores stay."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), select_together(model):
            yield
    finally:
        model.train(was_training)
