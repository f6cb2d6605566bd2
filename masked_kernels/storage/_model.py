"""How a model divides into layers with a mask and the rest of its state."""

from typing import Any

from torch import Tensor, nn

from ..nn._layer import Conv2dGeometry, FrozenLayer, LinearGeometry
from ..nn.packed import PackedConv2d, PackedLinear
from ..nn.targets import is_plain

PACKED: dict[str, type[PackedLinear] | type[PackedConv2d]] = {
    "linear": PackedLinear,
    "conv2d": PackedConv2d,
}


def kind_of(module: nn.Module | None) -> str | None:
    """``linear`` or ``conv2d`` for a layer of that kind, plain or with a mask, else None."""
    if isinstance(module, LinearGeometry | Conv2dGeometry) or is_plain(module):
        return "linear" if isinstance(module, LinearGeometry | nn.Linear) else "conv2d"
    return None


def geometry_of(kind: str, module: Any) -> dict[str, Any]:
    return (LinearGeometry if kind == "linear" else Conv2dGeometry).geometry_of(module)


def values_of(module: Any) -> Tensor:
    """The tensor that holds the values of a layer, plain or with a mask."""
    return module.held if isinstance(module, FrozenLayer) else module.weight


def frozen_layers(model: nn.Module) -> dict[str, FrozenLayer]:
    """Layers with a mask, under all their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, FrozenLayer)}


def state_outside(model: nn.Module, layers: set[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers that belong to none of ``layers``, by name.

    They are the model's own tensors, not copies; tied ones come under all their names. Raises
    ``TypeError`` for state of another kind (``get_extra_state``).
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    inside = tuple(f"{name}." for name in layers)
    names = [name for name in model.state_dict() if not name.startswith(inside)]
    for name in names:
        if name not in tensors:
            raise TypeError(f"model: got state {name!r}, expected parameters and buffers only")
    return {name: tensors[name] for name in names}
