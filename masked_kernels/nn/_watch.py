"""Whether what something was made of has changed."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

_version = attrgetter("_version")
_eps_and_training = attrgetter("eps", "training")


class Watch:
    """The parameters and buffers of layers, and the settings of norms among them.

    Asked with every call of a model, so it reads the modules' own dictionaries: ``__getattr__``
    and the iterators of ``nn.Module`` take as long as a small layer.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._norms = [layer for layer in self._layers if isinstance(layer, nn.BatchNorm2d)]
        self._parts = [layer._modules for layer in self._layers if layer._modules]
        self._key: list[Any] = []
        self._alive: list[Any] = []  # that ids in the key stay those of what is there

    def has_changed(self) -> bool:
        """Since the last time that this was asked; True at first, and always for tensors of
        inference mode, which have no version: a change would go unseen.
        """
        tensors = self.tensors()
        if any(map(Tensor.is_inference, tensors)):
            return True
        key: list[Any] = [
            *map(id, tensors),
            *map(_version, tensors),
            *map(Tensor.data_ptr, tensors),
            *map(_eps_and_training, self._norms),
        ]
        if key == self._key:
            return False
        self._key, self._alive = key, tensors
        return True

    def tensors(self) -> list[Tensor]:
        """All that there are now."""
        layers: list[nn.Module | None] = [*self._layers]
        for parts in self._parts:
            layers += parts.values()
        return [
            tensor
            for layer in layers
            if layer is not None
            for held in (layer._parameters, layer._buffers)
            for tensor in held.values()
            if tensor is not None
        ]
