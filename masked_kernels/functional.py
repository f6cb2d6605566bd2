"""The differentiable functions: validate, apply autocast, call the autograd.Function.

All of them compute with ``w_eff = scale * (weight ⊙ mask)``. ``weight`` is a tensor of the mask's
shape or a Prototype, read as ``flat[i] = values[i % period]``. float32, bfloat16, float16 and
(reference backend) float64; under autocast x, weight and bias are cast to the autocast dtype while
scores keep theirs. Shapes: M tokens, K inputs, N outputs; B, C, H, W as in ``F.conv2d``.
"""

import torch
from torch import Tensor

from . import _bound, _ops
from ._checks import (
    IntOrPair,
    check_conv2d,
    check_device,
    check_float,
    check_linear,
    check_operands,
    check_shape,
    check_type,
)
from .autograd import MaskedConv2d, MaskedLinear, ScoredConv2d, ScoredLinear, wants_grad
from .backends import AUTO
from .mask import PackedMask
from .prototype import Prototype
from .rules import Rule

Weight = Tensor | Prototype

_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)
"""Devices that have it. Asked once: torch 2.11 cannot compile the question."""


def masked_linear(
    x: Tensor,
    weight: Weight,
    mask: PackedMask,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = scale * x · (weight ⊙ mask)ᵀ + bias``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]`` or a Prototype, dtype of x. A dense weight that requires grad gets one, ⊙
            mask.
        mask: of shape ``(N, K)``.
        bias: ``[N]`` or None.
        scale: number or 0-d tensor (a constant: no gradient), None for 1.
        backend: runs on exactly this backend or raises ``BackendError`` with the reason; None
            chooses.

    Returns:
        ``[..., N]``, dtype of x (or of autocast). Differentiable once in x, bias and a dense
        weight.
    """
    call = ("masked_linear", x, weight, mask, bias, scale, backend, None)
    if (again := _bound.repeat(call)) is not None:
        return again
    x, values, bias = _autocast(x, weight, bias)
    check_type("mask", mask, PackedMask)
    check_linear(x, values, "mask", mask.shape)
    check_operands(x, values, bias, mask.shape)
    check_device("mask", mask.words, "x", x)
    operands = (values, mask.words, bias, _scale(scale, x))
    run = MaskedLinear.apply if wants_grad(x, values, bias) else _ops.masked_linear
    y: Tensor = run(_tokens(x), *operands, backend or AUTO)
    _bound.remember(call, operands)
    return _restore(y, x)


def scored_linear(
    x: Tensor,
    weight: Weight,
    scores: Tensor,
    rule: Rule,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``masked_linear`` with ``mask = rule(scores)``, differentiable in the scores.

    The gradient passes straight through the rule (edge-popup; PEMN, section 3.1): it is
    ``dL/dw_eff ⊙ w`` times the rule's scale at every position, kept or not, and ⊙ sign(scores)
    when the rule ranks |score|.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]`` or a Prototype, dtype of x.
        scores: ``[N, K]``, any float dtype.
        rule: TopK, Threshold or NM.
        bias: ``[N]`` or None.
        backend: as in ``masked_linear``.

    Returns:
        ``[..., N]``. Raises ``ValueError`` if a score is NaN, as rules do.
    """
    x, values, bias = _autocast(x, weight, bias)
    _check_scores(scores, rule, x)
    check_linear(x, values, "scores", scores.shape)
    check_operands(x, values, bias, scores.shape)
    backend = backend or AUTO
    words = rule.select(scores, backend)
    scale = rule.weight_scale(words, scores.numel())
    if not wants_grad(x, values, bias, scores):
        return _restore(_ops.masked_linear(_tokens(x), values, words, bias, scale, backend), x)
    y: Tensor = ScoredLinear.apply(  # type: ignore[no-untyped-call]
        _tokens(x), values, words, bias, scores, scale, rule.absolute, backend
    )
    return _restore(y, x)


def compact_linear(
    x: Tensor,
    kept: Tensor,
    mask: PackedMask,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``masked_linear`` given only the kept values of a dense weight; inference only.

    Args:
        x: ``[..., K]``.
        kept: the values whose bit is set, row by row, ``[mask.count()]``, dtype of x.
        mask, bias, scale, backend: as in ``masked_linear``.

    Returns:
        ``[..., N]``. Raises ``RuntimeError`` where a gradient would be wanted.
    """
    call = ("compact_linear", x, kept, mask, bias, scale, backend, None)
    if (again := _bound.repeat(call)) is not None:
        return again
    x, values, bias = _autocast(x, kept, bias)
    if values.dim() != 1:
        raise ValueError(f"kept: got shape {tuple(values.shape)}, expected 1 dimension")
    check_type("mask", mask, PackedMask)
    check_linear(x, values, "mask", mask.shape)
    check_operands(x, values, bias, mask.shape)
    check_device("mask", mask.words, "x", x)
    if wants_grad(x, values, bias):
        raise RuntimeError(
            "compact_linear: got an input that requires grad, expected none: a compact weight "
            "serves inference only; pack without compact=True, or use torch.no_grad()"
        )
    operands = (values, mask.words, bias, _scale(scale, x))
    y = _ops.compact_linear(_tokens(x), *operands, backend or AUTO)
    _bound.remember(call, operands)
    return _restore(y, x)


def masked_conv2d(
    x: Tensor,
    weight: Weight,
    mask: PackedMask,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.conv2d`` with the weight ``scale * (weight ⊙ mask)``.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``; channels_last stays channels_last.
        weight: ``[N, C / groups, kh, kw]`` or a Prototype, dtype of x. A dense weight that requires
            grad gets one, ⊙ mask.
        mask: of shape ``(N, C / groups, kh, kw)``.
        bias: ``[N]`` or None.
        stride, padding, dilation, groups: as in ``F.conv2d``, ``"same"`` and ``"valid"`` included.
        scale, backend: as in ``masked_linear``.

    Returns:
        ``[B, N, H', W']``, dtype of x (or of autocast). Differentiable once in x, bias and a dense
        weight.
    """
    asked = (stride, padding, dilation, groups)
    call = ("masked_conv2d", x, weight, mask, bias, scale, backend, asked)
    if (again := _bound.repeat(call)) is not None:
        return again
    x, values, bias = _autocast(x, weight, bias)
    check_type("mask", mask, PackedMask)
    batch, geometry = check_conv2d(x, values, "mask", mask.shape, stride, padding, dilation, groups)
    check_operands(x, values, bias, mask.shape)
    check_device("mask", mask.words, "x", x)
    operands = (values, mask.words, bias, _scale(scale, x), list(mask.shape[2:]))
    y: Tensor
    if wants_grad(x, values, bias):
        y = MaskedConv2d.apply(batch, *operands, geometry, backend or AUTO)  # type: ignore[no-untyped-call]
    else:
        y = _ops.masked_conv2d(batch, *operands, *geometry, backend or AUTO)
    if batch is x:  # else the op took another tensor
        _bound.remember(call, (*operands, *geometry))
    return y if x.dim() == 4 else y.squeeze(0)


def scored_conv2d(
    x: Tensor,
    weight: Weight,
    scores: Tensor,
    rule: Rule,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """``masked_conv2d`` with ``mask = rule(scores)``, differentiable as ``scored_linear`` is.

    Args:
        x: ``[B, C, H, W]`` or ``[C, H, W]``.
        weight: ``[N, C / groups, kh, kw]`` or a Prototype, dtype of x.
        scores: ``[N, C / groups, kh, kw]``, any float dtype.
        rule: TopK, Threshold or NM.
        bias: ``[N]`` or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.
        backend: as in ``masked_linear``.

    Returns:
        ``[B, N, H', W']``. Raises ``ValueError`` if a score is NaN, as rules do.
    """
    x, values, bias = _autocast(x, weight, bias)
    _check_scores(scores, rule, x)
    batch, geometry = check_conv2d(
        x, values, "scores", scores.shape, stride, padding, dilation, groups
    )
    check_operands(x, values, bias, scores.shape)
    backend = backend or AUTO
    words = rule.select(scores, backend)
    scale = rule.weight_scale(words, scores.numel())
    y: Tensor
    if wants_grad(x, values, bias, scores):
        y = ScoredConv2d.apply(  # type: ignore[no-untyped-call]
            batch, values, words, bias, scores, scale, rule.absolute, geometry, backend
        )
    else:
        kernel_size = list(scores.shape[2:])
        y = _ops.masked_conv2d(batch, values, words, bias, scale, kernel_size, *geometry, backend)
    return y if x.dim() == 4 else y.squeeze(0)


def _autocast(
    x: Tensor, weight: Weight, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the values of weight, and bias, in the autocast dtype where autocast is on.

    Custom ops are not on autocast's own list.
    """
    check_float("x", x)
    check_type("weight", weight, (Tensor, Prototype))
    values = weight.values if isinstance(weight, Prototype) else weight
    kind = x.device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    return x, values, bias


def _check_scores(scores: Tensor, rule: Rule, x: Tensor) -> None:
    check_float("scores", scores)
    check_type("rule", rule, Rule)
    check_device("scores", scores, "x", x)


def _scale(scale: float | Tensor | None, x: Tensor) -> Tensor | None:
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        check_shape("scale", scale, ())
        check_device("scale", scale, "x", x)
        if scale.requires_grad:
            raise ValueError("scale: got a tensor that requires grad, expected a constant")
        return scale
    return torch.full(
        (),
        scale,
        dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        device=x.device,
    )


def _tokens(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _restore(y: Tensor, x: Tensor) -> Tensor:
    """``[M, N]`` back to the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
