"""Whether what something was made of has changed."""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

_version = attrgetter("_version")
_eps_and_training = attrgetter("eps", "training")


class Watch:
    """The parameters and buffers of layers and of their children, and the settings of norms among
    the layers.

    Asked with every call of a model, so it reads the modules' own dictionaries: ``__getattr__``
    and the iterators of ``nn.Module`` take as long as a small layer.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._norms = [layer for layer in self._layers if isinstance(layer, nn.BatchNorm2d)]
        self._parts = [layer._modules for layer in self._layers if layer._modules]
        self._children: list[nn.Module | None] = []
        self._dictionaries = _dictionaries(self._layers)
        self._held: list[Tensor | None] = []
        self._tensors: list[Tensor] = []
        self._seen: list[Tensor] | None = None  # when this was asked
        self._state: list[Any] | None = None

    def has_changed(self) -> bool:
        """Since the last time that this was asked; True at first, and always for tensors of
        inference mode, which have no version: a change would go unseen.
        """
        tensors = self.tensors()
        if tensors is not self._seen:
            if any(map(Tensor.is_inference, tensors)):
                return True
            self._seen, self._state = tensors, None
        state: list[Any] = [
            *map(_version, tensors),
            *map(Tensor.data_ptr, tensors),
            *map(_eps_and_training, self._norms),
        ]
        if state == self._state:
            return False
        self._state = state
        return True

    def tensors(self) -> list[Tensor]:
        """All that there are now, each once; the same list while they are the same."""
        if self._parts:
            children = [*chain.from_iterable(map(dict.values, self._parts))]
            if children != self._children:
                self._children = children
                self._dictionaries = _dictionaries([*self._layers, *children])
        held = [*chain.from_iterable(map(dict.values, self._dictionaries))]
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            self._held = held
            self._tensors = [*{id(t): t for t in held if t is not None}.values()]
        return self._tensors


def _dictionaries(layers: Iterable[nn.Module | None]) -> list[dict[str, Any]]:
    """Of parameters and of buffers; of activations, none."""
    return [
        held
        for layer in layers
        if layer is not None and (layer._parameters or layer._buffers)
        for held in (layer._parameters, layer._buffers)
    ]
