"""What a benchmark is made of: a Case builds a Problem, which several Providers solve.

All providers of a problem compute the same function. An exact one may err, against float64, twice
as much as plain PyTorch in float32; a lossy one, of fewer bits, states a bound of its own.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

LARGEST_ERROR = 2.0
"""Of an exact provider, in units of the error of plain PyTorch in float32."""

ErrorOf = Callable[[Any, bool], float]
"""Result and "is lossy" to its error: relative if lossy, else in units of plain PyTorch's."""

Judge = Callable[[Any], ErrorOf]
"""Input to the errors of its results; the float64 truth is computed once."""


def unchanged(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Provider:
    """One way to solve the problem.

    Args:
        run: what is timed, called with an argument.
        prepare: an input to the argument, once and off the clock: another layout or dtype.
        refresh: changes the argument before every call, off the clock; returns it.
        moved: bytes that a call reads and writes at least, each once; None if nobody counts.
        lossy: the largest relative error allowed, or None for exact.
        largest_error: allowed if exact, in units of the error of plain PyTorch in float32.
        judge: of its results, if not the problem's.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = unchanged
    refresh: Callable[[Any], Any] | None = None
    moved: int | None = None
    lossy: float | None = None
    largest_error: float = LARGEST_ERROR
    judge: Judge | None = None

    def bound(self) -> float:
        """The largest error allowed, relative if lossy."""
        return self.largest_error if self.lossy is None else self.lossy


@dataclass(frozen=True)
class Problem:
    """One case, ready to run.

    Args:
        inputs: taken in turn.
        providers: by name, made only when asked for: some take seconds and a copy of the weights.
        judge: of the results.
        dense: the providers that do the dense layer's work exactly: what users would have else.
        multiply_adds: of the dense form; None where nothing is multiplied.
        trains: gradients are wanted, so run outside inference mode.
        checked: what results are checked on, if not the first input: float64 can take minutes.
    """

    inputs: tuple[Tensor, ...]
    providers: Mapping[str, Callable[[], Provider]]
    judge: Judge
    dense: tuple[str, ...]
    multiply_adds: int | None = None
    trains: bool = False
    checked: Tensor | None = None

    def example(self) -> Tensor:
        """The input that results are checked on."""
        return self.inputs[0] if self.checked is None else self.checked


@dataclass(frozen=True)
class Case(abc.ABC):
    """Sizes of a problem; ``group`` is the table that it belongs to."""

    group: ClassVar[str]

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @abc.abstractmethod
    def build(self, backend: str) -> Problem:
        """The problem, with the provider ``ours`` on ``backend``."""

    def facts(self) -> dict[str, Any]:
        """The sizes, JSON-able."""
        return asdict(self)


def against_float64(plain: Callable[[Any], Tensor], exact: Callable[[Tensor], Tensor]) -> Judge:
    """Judges by ``exact`` of the float64 input; ``plain`` is PyTorch's float32 way."""
    return lambda x: error_against(exact(x.double()), plain(x))


def error_against(
    truth: Tensor, plain: Tensor, tensor_of: Callable[[Any], Tensor] = unchanged
) -> ErrorOf:
    """Errors by Frobenius norm; the unit of exact ones is at least a rounding of float32.

    ``tensor_of`` turns a provider's result into a tensor like ``truth``.
    """
    size = float(truth.norm())
    rounding = torch.finfo(torch.float32).eps * size
    unit = max(float((plain.double() - truth).norm()), rounding)

    def error(result: Any, lossy: bool) -> float:
        distance = float((tensor_of(result).double() - truth).norm())
        return distance / (size if lossy else unit)

    return error


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
