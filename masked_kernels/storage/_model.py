"""How a model divides into masked layers and the rest of its state."""

from typing import Any

from torch import Tensor, nn

from ..nn._layer import Conv2dGeometry, FrozenLayer, LinearGeometry
from ..nn.packed import PackedConv2d, PackedLinear
from ..prototype import Prototype

PACKED: dict[str, type[PackedLinear] | type[PackedConv2d]] = {
    "linear": PackedLinear,
    "conv2d": PackedConv2d,
}


def kind_of(module: nn.Module | None) -> str | None:
    """``linear`` or ``conv2d`` for a layer of that kind, plain or with a mask, else None."""
    if isinstance(module, LinearGeometry) or type(module) is nn.Linear:
        return "linear"
    if isinstance(module, Conv2dGeometry) or type(module) is nn.Conv2d:
        return "conv2d"
    return None


def geometry_of(kind: str, module: Any) -> dict[str, Any]:
    return (LinearGeometry if kind == "linear" else Conv2dGeometry).geometry_of(module)


def values_of(module: Any) -> Tensor:
    """The dense weight or the prototype's values of a layer, plain or with a mask."""
    values = module.values if isinstance(module, FrozenLayer) else module.weight
    return values.values if isinstance(values, Prototype) else values


def frozen_layers(model: nn.Module) -> dict[str, FrozenLayer]:
    """Masked and packed layers under all their names."""
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
