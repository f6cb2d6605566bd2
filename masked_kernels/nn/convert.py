"""Conversion of whole models: plain -> masked -> packed, and back to plain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn

from .._checks import check_type
from ..prototype import Prototype
from ._init import draw_scores, stream
from ._layer import Conv2dGeometry, FrozenLayer, LinearGeometry
from ._values import make_values
from .compact import compact_layer
from .config import MaskConfig
from .masked import MaskedConv2d, MaskedLinear, _MaskedLayer
from .packed import PackedLinear, pack_layer
from .packed_sequential import PackedSequential, is_fusable
from .pruned import _PrunedLayer
from .targets import FilterFn, Plain, find_targets, forbid_fused_encoders


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did: layers converted, as ``{name: description}``, and layers skipped, as
    ``{name: reason}``.
    """

    converted: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)}, skipped {len(self.skipped)}"]
        lines += [f"  {name}: {text}" for name, text in self.converted.items()]
        lines += [f"  {name}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def mask_model_(
    model: nn.Module, config: MaskConfig, filter_fn: FilterFn | None = None, seed: int = 0
) -> ConversionReport:
    """Replace every ``nn.Linear`` and ``nn.Conv2d`` inside ``model`` by its masked form, in place.

    Scores and, unless ``config.values`` is ``"pretrained"``, frozen values are drawn anew: a
    layer's draw depends on ``seed`` and on the layer's position alone, so recipes of one seed share
    scores and initial weights. Global random state is untouched.

    A layer whose mask would change more than its own output, or go unseen, stays as it is: one that
    shares its weight, whose weight is computed, quantised or read by the module around it (as
    nn.MultiheadAttention does), or whose class has a forward of its own. The report names these,
    and all other modules with a weight, with the reason. A module under two names is converted
    once.

    Args:
        model: a module that contains the layers; a bare ``nn.Linear`` cannot be replaced in place.
        config: see MaskConfig and the presets in ``masked_kernels.recipes``.
        filter_fn: ``filter_fn(name, layer)`` decides which of the layers that can be masked are;
            None masks all. ``lambda name, layer: isinstance(layer, nn.Conv2d)`` goes by type,
            ``lambda name, layer: name != "head"`` by name.
        seed: of all draws.
    """
    check_type("config", config, MaskConfig)
    _check_contains(model, Plain)
    targets, skipped = find_targets(model, filter_fn, config.makes_prototypes)
    values = make_values(targets, config, seed)
    masked: dict[nn.Module, FrozenLayer] = {}
    for index, (name, plain) in enumerate(targets.items()):
        generator = stream(seed, index, "scores")
        masked[plain] = _masked_like(plain, config, values[name], generator)
    _replace(model, masked)
    if not config.train_norm:
        _freeze_norms(model)
    return ConversionReport({name: repr(masked[plain]) for name, plain in targets.items()}, skipped)


def pack_model_(model: nn.Module, compact: bool = False) -> ConversionReport:
    """Replace every masked or pruned layer by its packed form (bits and values), in place, with the
    same outputs.

    An ``nn.Sequential`` or Residual inside the model that holds a convolution followed by
    BatchNorm2d, GELU or ReLU becomes a PackedSequential, which runs them as one op: the same
    outputs up to rounding.

    Args:
        model: a module that contains the layers.
        compact: keep of a linear layer's dense weight only what its mask keeps (``CompactLinear``):
            less memory, and faster for few tokens.
    """
    report = _convert(model, (_MaskedLayer, _PrunedLayer), pack_layer)
    converted = report.converted
    if compact:
        dense = {
            layer: compact_layer(layer)
            for layer in model.modules()
            if type(layer) is PackedLinear and layer.weight is not None
        }
        converted |= {name: repr(dense[m]) for name, m in model.named_modules() if m in dense}
        _replace(model, dense)
    fuse_(model)
    return ConversionReport(converted, report.skipped)


def fuse_(model: nn.Module) -> None:
    """Make every sequence that can run packed layers as one op a PackedSequential, in place."""
    for module in reversed(list(model.modules())):  # the inner ones first
        if module is not model and is_fusable(module):
            _replace(model, {module: PackedSequential(module)})  # type: ignore[arg-type]


def materialize_(model: nn.Module) -> ConversionReport:
    """Replace every masked, pruned or packed layer by a plain ``nn.Linear`` or ``nn.Conv2d``, in
    place, with the same outputs.
    """
    report = _convert(model, FrozenLayer, lambda layer: layer.to_plain())
    for module in reversed(list(model.modules())):
        if isinstance(module, PackedSequential):
            _replace(model, {module: module.to_plain()})
    return report


def _convert(
    model: nn.Module,
    kind: type[FrozenLayer] | tuple[type[FrozenLayer], ...],
    convert: Callable[[Any], nn.Module],
) -> ConversionReport:
    _check_contains(model, kind)
    replacements = {layer: convert(layer) for layer in model.modules() if isinstance(layer, kind)}
    converted = {
        name: repr(replacements[m]) for name, m in model.named_modules() if m in replacements
    }
    _replace(model, replacements)
    return ConversionReport(converted, {})


def _check_contains(model: nn.Module, kind: Any) -> None:
    if isinstance(model, kind):
        raise ValueError(
            f"model: got a bare {type(model).__name__}, expected a module that contains such layers"
        )


def _replace(model: nn.Module, replacements: dict[Any, Any]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() hides a module's second name
            if child in replacements:
                setattr(parent, name, replacements[child])
    forbid_fused_encoders(model)


def _masked_like(
    plain: nn.Linear | nn.Conv2d,
    config: MaskConfig,
    values: Tensor | Prototype,
    generator: Generator,
) -> FrozenLayer:
    kind, geometry = (
        (MaskedLinear, LinearGeometry)
        if isinstance(plain, nn.Linear)
        else (MaskedConv2d, Conv2dGeometry)
    )
    layer: FrozenLayer = kind(
        **geometry.geometry_of(plain), bias=False, device="meta", rule=config.rule, weight=values
    )
    layer.scores = draw_scores(plain.weight, config.score_init, generator)
    if plain.bias is not None:
        layer.bias = nn.Parameter(plain.bias, requires_grad=config.train_bias)
    layer.train(plain.training)
    return layer


def _freeze_norms(model: nn.Module) -> None:
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    for module in model.modules():
        if isinstance(module, norms):
            module.requires_grad_(False)
