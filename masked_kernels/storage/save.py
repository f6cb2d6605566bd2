"""``save_masked``: a masked, pruned or packed model into one file."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.registry import ModelSpec, spec_of
from ..nn._layer import FrozenLayer
from ..nn.packed import PackedConv2d, PackedLinear, pack_layer
from ..prototype import Prototype
from ._model import frozen_layers, geometry_of, kind_of, state_outside
from .codecs import AUTO, check_codec, compress
from .format import Contents, LayerRecord, encode, write
from .origin import Origin, origin_of
from .report import SizeReport, size_report


def save_masked(model: nn.Module, path: str | os.PathLike[str], codec: str = AUTO) -> SizeReport:
    """Write what ``model`` needs to predict as it does now, and nothing else.

    That is: mask bits; each prototype once, or the seed that makes it anew; of each dense weight
    what its mask keeps, or all of it once if several layers share it; and the rest of the model's
    state. A masked model is saved as what its scores select at this moment, without the scores.
    The model is not changed. The file appears in one step: a save that fails or is killed leaves
    an older file as it was.

    Args:
        model: contains masked, pruned or packed layers. If ``create_model`` built it,
            ``load_masked(path)`` can rebuild it.
        path: of the file, replaced if it exists.
        codec: of the mask bits: ``raw``, ``zlib``, ``lzma``, or ``auto`` for the smallest of
            them, layer by layer.

    Returns:
        The bytes of each part.

    Raises:
        ValueError: the model has no masked layers, or is one itself; or the codec is unknown.
        TypeError: the model has state other than tensors, or was created with arguments that
            JSON cannot hold.
    """
    check_codec(codec)
    contents = _collect(model, codec)
    data = encode(contents)
    write(Path(path), data)
    return size_report(contents, len(data))


class _Tensors:
    """Tensors by name, each stored under the first name it comes with."""

    def __init__(self) -> None:
        # As they came, until all are in: a freed tensor could lend its address to the next one.
        self._stored: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._seeds: dict[int, str] = {}
        self.tied: dict[str, str] = {}
        self.origins: dict[str, Origin] = {}

    def store(self, name: str, tensor: Tensor) -> str:
        """The name under which the tensor is stored: ``name``, unless it was there before."""
        stored = self._names.setdefault(_place(tensor), name)
        if stored == name:
            self._stored[name] = tensor
        return stored

    def store_or_tie(self, name: str, tensor: Tensor) -> None:
        stored = self.store(name, tensor)
        if stored != name:
            self.tied[name] = stored

    def store_prototype(self, prototype: Prototype, longest: int) -> str:
        """``longest`` is the size of the model's largest layer: no seed makes more than that."""
        count = sum(name.startswith("prototype/") for name in self._names.values())
        name = self._names.setdefault(_place(prototype.values), f"prototype/{count}")
        if name == f"prototype/{count}":
            values, origin = origin_of(prototype)
            if origin is None or origin.period > longest:
                values, origin = prototype.values, None
            if values is not None:
                self._stored[name] = values
            if origin is not None:
                self.origins[name] = origin
                for seed in origin.seeds().values():
                    stored = self._seeds.setdefault(seed, f"seed/{len(self._seeds)}")
                    self._stored[stored] = torch.tensor([seed], dtype=torch.int64)
        return name

    def copies(self) -> dict[str, Tensor]:
        """Row-major copies on the CPU that share no memory, as the container wants them."""
        return {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, t in self._stored.items()
        }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements of the same memory."""
    memory = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*memory, tensor.shape, tensor.stride(), tensor.dtype)


def _collect(model: nn.Module, codec: str) -> Contents:
    layers = frozen_layers(model)
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without masked layers, "
            "expected one that mask_model_ or pack_model_ converted"
        )
    if "" in layers:
        raise ValueError(
            f"model: got a bare {type(model).__name__}, expected a module that contains such layers"
        )
    tensors = _Tensors()
    packed = {layer: _PackedWithBytes.of(layer, codec) for layer in dict.fromkeys(layers.values())}
    users = Counter(_place(p.layer.weight) for p in packed.values() if p.layer.weight is not None)
    longest = max(torch.Size(layer.weight_shape).numel() for layer in packed)
    records = []
    for name, layer in layers.items():
        weight = packed[layer].layer.weight
        alone = weight is not None and users[_place(weight)] == 1
        records.append(_store_layer(tensors, name, packed[layer], alone, longest))
    for name, tensor in state_outside(model, set(layers)).items():
        tensors.store_or_tie(f"state/{name}", tensor)
    return Contents(_spec(model), tuple(records), tensors.tied, tensors.origins, tensors.copies())


@dataclass(frozen=True)
class _PackedWithBytes:
    """A layer as it is stored: packed, the bytes of its mask under ``codec``, and the values of a
    dense weight that the mask keeps.
    """

    layer: PackedLinear | PackedConv2d
    codec: str
    mask: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, layer: FrozenLayer, codec: str) -> "_PackedWithBytes":
        packed = pack_layer(layer)
        used, data = compress(packed.mask.to_bytes(), codec)
        mask = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        kept = None if packed.weight is None else packed.weight[packed.mask.unpack()]
        return cls(packed, used, mask, kept)


def _store_layer(
    tensors: _Tensors, name: str, packed: _PackedWithBytes, alone: bool, longest: int
) -> LayerRecord:
    """``alone`` says that no other layer has the dense weight."""
    layer = packed.layer
    tensors.store_or_tie(f"mask/{name}", packed.mask)
    if layer.prototype is not None:
        values = tensors.store_prototype(layer.prototype, longest)
    else:
        assert layer.weight is not None and packed.kept is not None
        values = (
            tensors.store(f"kept/{name}", packed.kept)
            if alone
            else tensors.store(f"weight/{name}", layer.weight)
        )
    if layer.bias is not None:
        tensors.store_or_tie(f"bias/{name}", layer.bias)
    if layer.scale is not None:
        tensors.store_or_tie(f"scale/{name}", layer.scale)
    kind = kind_of(layer)
    assert kind is not None
    return LayerRecord(
        name, kind, tuple(layer.weight_shape), geometry_of(kind, layer), packed.codec, values
    )


def _spec(model: nn.Module) -> ModelSpec | None:
    spec = spec_of(model)
    if spec is not None:
        try:
            json.dumps(spec.arguments)
        except TypeError as error:
            raise TypeError(
                f"model: got {spec}, expected arguments that JSON can hold: {error}"
            ) from error
    return spec
