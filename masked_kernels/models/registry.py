"""Models by name, and the record by which a saved file rebuilds one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_builders: dict[str, Callable[..., nn.Module]] = {}


@dataclass(frozen=True)
class ModelSpec:
    """The call that built a model: ``create_model(name, **arguments)``, arguments JSON-able."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        arguments = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
        return f"create_model({self.name!r}{arguments})"


def register_model(builder: Builder, name: str | None = None, **defaults: Any) -> Builder:
    """Make ``builder(**defaults, **arguments) -> nn.Module`` available under ``name``, by default
    its own; an argument beats a default. Also a decorator.
    """
    _builders[name or builder.__name__] = partial(builder, **defaults)
    return builder


def create_model(name: str, **arguments: Any) -> nn.Module:
    """Build a registered model; ``list_models()`` has the names.

    All of this package's take ``num_classes`` and ``in_channels``; their classes have the rest.
    """
    if name not in _builders:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(list_models())}")
    model = _builders[name](**arguments)
    model._model_spec = ModelSpec(name, arguments)  # type: ignore[assignment]
    return model


def list_models() -> list[str]:
    """Names that ``create_model`` takes, sorted."""
    return sorted(_builders)


def spec_of(model: nn.Module) -> ModelSpec | None:
    """The call that built ``model``, or None if ``create_model`` did not."""
    spec = getattr(model, "_model_spec", None)
    return spec if isinstance(spec, ModelSpec) else None
