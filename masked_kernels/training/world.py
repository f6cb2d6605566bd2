"""The processes that train one model together. Here: one, this one."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


class World:
    """One process. A subclass for several replaces the methods; nothing else knows how many.

    Attributes:
        rank: number of this process; 0 writes files and prints.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what training calls in the place of ``model``: after its backward every process
        has the mean of all processes' gradients.

        Called once, before the optimizer is made; may change the model's parameters in place.
        """
        return model

    def backward(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one forward and backward; only the step's ``last`` one has to make
        gradients equal.
        """
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes."""
        return values

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """Return the whole model's state, on every process; all of them call this."""
        return model.state_dict()

    def load_model_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Put back what `model_state` returned, in a world of any size."""
        model.load_state_dict(state)

    def optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Return the whole optimizer's state, on every process; all of them call this."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Put back what `optimizer_state` returned, in a world of any size."""
        optimizer.load_state_dict(state)
