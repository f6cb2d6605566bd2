"""Several processes that torchrun started, training one model: copies of it, or shards."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import (
    average_running_statistics_,
    gather_state,
    load_model_state,
    load_optimizer_state,
    replicate,
    shard_model_,
)
from .world import World

T = TypeVar("T")


class Replicas(World):
    """Every process has the whole model (``distributed.replicate``)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        return replicate(model)

    def backward(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = nullcontext() if last else wrapped.no_sync()  # type: ignore[operator]
        return context

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def from_main(self, make: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        made: T = outcome[0]
        return made

    def settle(self, model: nn.Module) -> None:
        average_running_statistics_(model)

    def whole(self, model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
        return model if self.is_main else None

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        state: dict[str, Any] = gather_state(model.state_dict())
        return state if self.is_main else {}

    def load_model_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        load_model_state(model, state)

    def optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = gather_state(optimizer.state_dict())
        return state if self.is_main else {}

    def load_optimizer_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        load_optimizer_state(optimizer, state)


class Shards(Replicas):
    """Every process has some rows of the scores (``distributed.shard_model_``)."""

    def wrap(self, model: nn.Module) -> nn.Module:
        shard_model_(model)
        return model

    def backward(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def whole(self, model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
        state = self.model_state(model)
        if not self.is_main:
            return None
        whole = build()
        whole.load_state_dict(state)
        return whole


WORLDS: dict[str, type[World]] = {"none": World, "ddp": Replicas, "fsdp": Shards}


class ProcessLost(ConnectionError):
    """The other processes of the job cannot be reached, or the job is being stopped."""


@contextmanager
def open_world(parallel: str, device: str, timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, for the ``with`` block; or be one alone.

    Args:
        parallel: ``none``, ``ddp`` or ``fsdp``.
        device: of this process, see `own_device`. Gloo joins CPUs, NCCL GPUs.
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        ValueError: ``parallel`` is not how the process was started.
        ProcessLost: another process died, did not answer in time, or had this one stopped.
    """
    if parallel not in WORLDS:
        raise ValueError(f"parallel: got {parallel!r}, expected one of {', '.join(WORLDS)}")
    launched = dist.is_torchelastic_launched()
    if launched != (parallel != "none"):
        expected = "ddp or fsdp under torchrun" if launched else "none without torchrun"
        raise ValueError(f"parallel: got {parallel!r}, expected {expected}")
    if not launched:
        yield World()
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield WORLDS[parallel]()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, as it stops the others
        raise ProcessLost(
            f"process {dist.get_rank()} of {dist.get_world_size()}: another process is gone, or "
            f"did not answer in {timeout:.0f} s ({_reason(error)})"
        ) from error
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the place in Gloo's source."""
    return str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]


def own_device(device: str) -> str:
    """Return ``device``, numbered for this process of those that torchrun started on a machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise ProcessLost(
        f"process {dist.get_rank()} of {dist.get_world_size()}: stopped by signal {number}, as "
        "torchrun does when another process has failed"
    )
