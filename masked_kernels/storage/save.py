"""``save_masked``: a masked, pruned or packed model into one file."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.registry import ModelSpec, spec_of
from ..nn._layer import FrozenLayer
from ..nn.packed import PackedConv2d, PackedLinear, pack_layer
from ._model import frozen_layers, geometry_of, kind_of, state_outside
from .codecs import AUTO, check_codec, compress
from .format import Contents, LayerRecord, encode, write
from .report import SizeReport, size_report


def save_masked(model: nn.Module, path: str | os.PathLike[str], codec: str = AUTO) -> SizeReport:
    """Write what ``model`` needs to predict as it does now, and nothing else.

    That is: mask bits, each prototype or dense weight once, and the rest of the model's state. A
    masked model is saved as what its scores select at this moment, without the scores. The model
    is not changed. The file appears in one step: a save that fails or is killed leaves an older
    file as it was.

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
        self.tied: dict[str, str] = {}

    def store(self, name: str, tensor: Tensor) -> str:
        """The name under which the tensor is stored: ``name``, unless it was there before."""
        place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        stored = self._names.setdefault((*place, tensor.shape, tensor.stride(), tensor.dtype), name)
        if stored == name:
            self._stored[name] = tensor
        return stored

    def store_or_tie(self, name: str, tensor: Tensor) -> None:
        stored = self.store(name, tensor)
        if stored != name:
            self.tied[name] = stored

    def store_prototype(self, values: Tensor) -> str:
        count = sum(name.startswith("prototype/") for name in self._stored)
        return self.store(f"prototype/{count}", values)

    def copies(self) -> dict[str, Tensor]:
        """Row-major copies on the CPU that share no memory, as the container wants them."""
        return {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, t in self._stored.items()
        }


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
    packed: dict[FrozenLayer, tuple[PackedLinear | PackedConv2d, str, Tensor]] = {}
    records = []
    for name, layer in layers.items():
        if layer not in packed:
            packed[layer] = _packed_with_bytes(layer, codec)
        records.append(_store_layer(tensors, name, *packed[layer]))
    for name, tensor in state_outside(model, set(layers)).items():
        tensors.store_or_tie(f"state/{name}", tensor)
    return Contents(_spec(model), tuple(records), tensors.tied, tensors.copies())


def _packed_with_bytes(
    layer: FrozenLayer, codec: str
) -> tuple[PackedLinear | PackedConv2d, str, Tensor]:
    packed = pack_layer(layer)
    used, data = compress(packed.mask.to_bytes(), codec)
    return packed, used, torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _store_layer(
    tensors: _Tensors,
    name: str,
    layer: PackedLinear | PackedConv2d,
    codec: str,
    mask: Tensor,
) -> LayerRecord:
    tensors.store_or_tie(f"mask/{name}", mask)
    if layer.prototype is None:
        assert layer.weight is not None
        values = tensors.store(f"weight/{name}", layer.weight)
    else:
        values = tensors.store_prototype(layer.prototype.values)
    if layer.bias is not None:
        tensors.store_or_tie(f"bias/{name}", layer.bias)
    if layer.scale is not None:
        tensors.store_or_tie(f"scale/{name}", layer.scale)
    kind = kind_of(layer)
    assert kind is not None
    return LayerRecord(
        name, kind, tuple(layer.weight_shape), geometry_of(kind, layer), codec, values
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
