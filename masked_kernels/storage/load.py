"""``load_masked``: a file into a packed inference model."""

import os
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from ..models.registry import create_model
from ..nn.convert import _replace, fuse_
from ..nn.packed import PackedConv2d, PackedLinear
from ..prototype import Prototype
from ._model import PACKED, frozen_layers, geometry_of, kind_of, state_outside, values_of
from .format import Contents, FormatError, LayerRecord, naming, read

Model = TypeVar("Model", bound=nn.Module)


@overload
def load_masked(path: str | os.PathLike[str]) -> nn.Module: ...
@overload
def load_masked(path: str | os.PathLike[str], into: Model) -> Model: ...


def load_masked(path: str | os.PathLike[str], into: nn.Module | None = None) -> nn.Module:
    """The packed inference model in the file at ``path``: the outputs of the model that was saved.

    Args:
        path: of a file that ``save_masked`` wrote.
        into: a model of the same architecture and dtypes, plain or with masks, on any device;
            converted in place and returned. None rebuilds, on the CPU, what ``create_model`` built.

    Returns:
        The model, in evaluation mode.

    Raises:
        FormatError: a ``ValueError``; the file is truncated, altered, of another kind or version,
            or does not fit the model. The message names the file, what came and what was expected.
            ``into`` is untouched: nothing is written before all is checked.
    """
    path = Path(path)
    contents, _ = read(path)
    with naming(path):
        model = _rebuild(contents) if into is None else into
        layers, state = _match(contents, model)
        packed = _build_layers(contents, layers)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(contents.require(f"state/{name}"))
    _replace(model, packed)
    fuse_(model)
    return model.eval()


def _rebuild(contents: Contents) -> nn.Module:
    """The plain model in the dtypes of the file. Global random state is untouched."""
    spec = contents.model
    if spec is None:
        raise FormatError(
            "got a model that create_model did not build, expected load_masked(path, into=model)"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            model = create_model(spec.name, **spec.arguments)
    except (ValueError, TypeError) as error:
        raise FormatError(f"cannot rebuild {spec}: {error}") from error
    modules = dict(model.named_modules())
    for layer in contents.layers:
        if kind_of(modules.get(layer.name)):
            modules[layer.name].to(contents.values_dtype(layer))
    for name, tensor in state_outside(model, {layer.name for layer in contents.layers}).items():
        stored = contents.tensor(f"state/{name}")
        if stored is not None:
            tensor.data = tensor.data.to(stored.dtype)
    return model


def _match(contents: Contents, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """The model's layers and the rest of its state, if they fit the file's one to one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for layer in contents.layers:
        module = modules.get(layer.name)
        _check_layer(contents, layer, module)
        assert module is not None
        layers[layer.name] = module
    for name, frozen in frozen_layers(model).items():
        if name not in layers:
            raise FormatError(
                f"layer {name!r}: got none, expected one as in the model: {type(frozen).__name__}"
            )
    state = state_outside(model, set(layers))
    names = contents.state_names()
    for name in sorted(names | state.keys()):
        if name not in state:
            raise FormatError(f"tensor {name!r}: unexpected, the model has no such tensor")
        if name not in names:
            raise FormatError(f"tensor {name!r}: missing, expected one as in the model")
        _check_tensor(name, contents.require(f"state/{name}"), state[name])
    _check_ties(contents, state)
    return layers, state


def _check_layer(contents: Contents, layer: LayerRecord, module: Any) -> None:
    where = f"layer {layer.name!r}"
    kind = kind_of(module)
    if kind != layer.kind:
        found = "nothing of that name" if module is None else type(module).__name__
        raise FormatError(f"{where}: got {layer.kind}, expected as in the model: {found}")
    expected = geometry_of(kind, module)
    if layer.geometry != expected:
        differing = [key for key in expected if layer.geometry.get(key) != expected[key]]
        raise FormatError(
            f"{where}: got {_fields(layer.geometry, differing)}, "
            f"expected {_fields(expected, differing)} as in the model"
        )
    values = values_of(module)
    _check_device(layer.name, values)
    stored = contents.values_dtype(layer)
    if stored != values.dtype:
        raise FormatError(
            f"{where}: got {stored}, expected {values.dtype} as in the model; "
            f"model.to({stored}) makes it fit"
        )
    has_bias = contents.tensor(f"bias/{layer.name}") is not None
    if has_bias != (module.bias is not None):
        raise FormatError(
            f"{where}: got bias={has_bias}, expected bias={not has_bias} as in the model"
        )


def _check_tensor(name: str, stored: Tensor, expected: Tensor) -> None:
    _check_device(name, expected)
    for what, got, wanted in (
        ("shape", tuple(stored.shape), tuple(expected.shape)),
        ("dtype", stored.dtype, expected.dtype),
    ):
        if got != wanted:
            raise FormatError(
                f"tensor {name!r}: got {what} {got}, expected {wanted} as in the model"
            )


def _check_device(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"into: got {name!r} on the meta device, expected memory to load into")


def _check_ties(contents: Contents, state: dict[str, Tensor]) -> None:
    """One tensor of the model cannot take two of the file."""
    first: dict[Tensor, str] = {}
    for name, tensor in state.items():
        other = first.setdefault(tensor, name)
        if contents.require(f"state/{name}") is not contents.require(f"state/{other}"):
            raise FormatError(
                f"tensor {name!r}: got one of its own, expected {other!r}, tied as in the model"
            )


def _build_layers(
    contents: Contents, layers: dict[str, nn.Module]
) -> dict[nn.Module, PackedLinear | PackedConv2d]:
    """The packed form of each layer, on its device; what the file shares is one object."""
    shared: dict[Any, Any] = {}

    def values(layer: LayerRecord, device: torch.device) -> Any:
        # Of kept values the places are the mask's.
        mask = layer.values.startswith("kept/") and contents.require(f"mask/{layer.name}")
        key = (layer.values, mask, device)
        if key not in shared:
            made = contents.make_values(layer)
            shared[key] = made.to(device) if isinstance(made, Prototype) else _frozen(made, device)
        return shared[key]

    def bias(layer: LayerRecord, device: torch.device) -> nn.Parameter:
        key = (contents.require(f"bias/{layer.name}"), device)
        if key not in shared:
            shared[key] = _frozen(*key)
        return cast("nn.Parameter", shared[key])

    packed = {}
    for layer in contents.layers:
        module: Any = layers[layer.name]
        device = values_of(module).device
        scale = contents.tensor(f"scale/{layer.name}")
        try:
            packed[module] = PACKED[layer.kind](
                **layer.geometry,
                weight=values(layer, device),
                mask=contents.mask(layer).to(device),
                bias=None if module.bias is None else bias(layer, device),
                scale=None if scale is None else scale.to(device),
            )
        except FormatError:
            raise
        except (ValueError, TypeError) as error:
            raise FormatError(f"layer {layer.name!r}: {error}") from error
    return packed


def _frozen(tensor: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.to(device), requires_grad=False)


def _fields(geometry: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={geometry.get(key)!r}" for key in keys)
