"""Several processes that torchrun started, training one model: copies of it, or shards."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

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
