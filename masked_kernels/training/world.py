"""The processes that train one model together. Here: one, this one; processes.py has several."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class World:
    """One process. A subclass for several replaces the methods; nothing else knows how many.

    All processes call the methods, in the same order.

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

    def from_main(self, make: Callable[[], T]) -> T:
        """Return, or raise, on every process what ``make`` does on the main one."""
        return make()

    def settle(self, model: nn.Module) -> None:
        """Make equal what each process counted for itself: BatchNorm's running statistics."""

    def whole(self, model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
        """Return the model as one process has it, built anew if need be, on the main process; None
        on others.
        """
        return model

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """Return the whole model's state on the main process, an empty one on others."""
        return model.state_dict()

    def load_model_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Put back what `model_state` returned in a world of any size, given on every process."""
        model.load_state_dict(state)

    def optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Return the whole optimizer's state on the main process, an empty one on others."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Put back what `optimizer_state` returned in a world of any size, given on every
        process.
        """
        optimizer.load_state_dict(state)
