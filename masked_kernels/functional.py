"""The differentiable functions: validate, apply autocast, call the autograd.Function.

All of them compute with ``w_eff = scale * (weight ⊙ mask)``. ``weight`` is a tensor of the mask's
shape or a Prototype, read as ``flat[i] = values[i % period]``. float32, bfloat16, float16 and
(reference backend) float64; under autocast x, weight and bias are cast to the autocast dtype while
scores keep theirs. Shapes: M tokens, K inputs, N outputs; B, C, H, W as in ``F.conv2d``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _bound, _ops
from ._checks import check_device, check_float, check_like, check_shape, check_type, pair
from .autograd import GeluBatchNorm, MaskedConv2d, MaskedLinear, ScoredConv2d, ScoredLinear
from .backends import AUTO, bind
from .backends._layout import at_least_float32
from .mask import PackedMask
from .prototype import Prototype
from .rules import Rule

Weight = Tensor | Prototype
IntOrPair = int | Sequence[int]


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
    key = _bound.key_of("masked_linear", x, weight, mask, bias, scale, backend)
    if run := _bound.find(mask, key):
        return run(x)
    x, values, bias = _autocast(x, weight, bias)
    check_type("mask", mask, PackedMask)
    _check_linear(x, values, "mask", mask.shape)
    _check_operands(x, values, bias, mask.shape)
    check_device("mask", mask.words, "x", x)
    operands = (values, mask.words, bias, _scale(scale, x))
    backend = backend or AUTO
    if _wants_grad(x, values, bias):
        y: Tensor = MaskedLinear.apply(_tokens(x), *operands, backend)  # type: ignore[no-untyped-call]
    else:
        y = _ops.masked_linear(_tokens(x), *operands, backend)
        if key is not None:
            run = _over_tokens(bind("masked_linear", backend, _tokens(x), *operands), x)
            _bound.keep(mask, key, run, (*operands, scale))
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
        ``[..., N]``. Raises ``ValueError`` if a score is NaN.
    """
    x, values, bias = _autocast(x, weight, bias)
    _check_scores(scores, rule, x)
    _check_linear(x, values, "scores", scores.shape)
    _check_operands(x, values, bias, scores.shape)
    backend = backend or AUTO
    words = rule.select(scores, backend)
    scale = rule.weight_scale(words, scores.numel())
    if not _wants_grad(x, values, bias, scores):
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
    key = _bound.key_of("compact_linear", x, kept, mask, bias, scale, backend)
    if run := _bound.find(mask, key):
        return run(x)
    x, values, bias = _autocast(x, kept, bias)
    if values.dim() != 1:
        raise ValueError(f"kept: got shape {tuple(values.shape)}, expected 1 dimension")
    check_type("mask", mask, PackedMask)
    _check_linear(x, values, "mask", mask.shape)
    _check_operands(x, values, bias, mask.shape)
    check_device("mask", mask.words, "x", x)
    if _wants_grad(x, values, bias):
        raise RuntimeError(
            "compact_linear: got an input that requires grad, expected none: a compact weight "
            "serves inference only; pack without compact=True, or use torch.no_grad()"
        )
    operands = (values, mask.words, bias, _scale(scale, x))
    backend = backend or AUTO
    y = _ops.compact_linear(_tokens(x), *operands, backend)
    if key is not None:
        run = _over_tokens(bind("compact_linear", backend, _tokens(x), *operands), x)
        _bound.keep(mask, key, run, (*operands, scale))
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
    key = _bound.key_of("masked_conv2d", x, weight, mask, bias, scale, backend, asked)
    if run := _bound.find(mask, key):
        return run(x)
    x, values, bias = _autocast(x, weight, bias)
    check_type("mask", mask, PackedMask)
    batch, geometry = _check_conv2d(
        x, values, "mask", mask.shape, stride, padding, dilation, groups
    )
    _check_operands(x, values, bias, mask.shape)
    check_device("mask", mask.words, "x", x)
    operands = (values, mask.words, bias, _scale(scale, x), list(mask.shape[2:]))
    backend = backend or AUTO
    y: Tensor
    if _wants_grad(x, values, bias):
        y = MaskedConv2d.apply(batch, *operands, geometry, backend)  # type: ignore[no-untyped-call]
    else:
        y = _ops.masked_conv2d(batch, *operands, *geometry, backend)
        if key is not None and batch is x:
            run = bind("masked_conv2d", backend, x, *operands, *geometry)
            _bound.keep(mask, key, run, (*operands, scale))
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
        ``[B, N, H', W']``. Raises ``ValueError`` if a score is NaN.
    """
    x, values, bias = _autocast(x, weight, bias)
    _check_scores(scores, rule, x)
    batch, geometry = _check_conv2d(
        x, values, "scores", scores.shape, stride, padding, dilation, groups
    )
    _check_operands(x, values, bias, scores.shape)
    backend = backend or AUTO
    words = rule.select(scores, backend)
    scale = rule.weight_scale(words, scores.numel())
    y: Tensor
    if _wants_grad(x, values, bias, scores):
        y = ScoredConv2d.apply(  # type: ignore[no-untyped-call]
            batch, values, words, bias, scores, scale, rule.absolute, geometry, backend
        )
    else:
        kernel_size = list(scores.shape[2:])
        y = _ops.masked_conv2d(batch, values, words, bias, scale, kernel_size, *geometry, backend)
    return y if x.dim() == 4 else y.squeeze(0)


def gelu_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.batch_norm(F.gelu(x), ...) + residual``, which keeps x alone for the backward.

    Args:
        x: ``[B, C, H, W]``; channels_last stays channels_last.
        running_mean, running_var: ``[C]``, dtype of x or float32; updated in place when training,
            else what x is normalised by. None only when training.
        weight, bias: ``[C]``, dtype of x or float32, or None for 1 and 0.
        training, momentum, eps: as in ``F.batch_norm``.
        residual: ``[B, C, H, W]``, dtype of x, or None for 0.
        backend: as in ``masked_linear``.

    Returns:
        ``[B, C, H, W]``. Differentiable once in x, weight, bias and residual. Raises ``ValueError``
        when training with fewer than 2 values per channel.
    """
    check_float("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, C, H, W)")
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, vector in vectors.items():
        if vector is not None:
            check_type(name, vector, Tensor)
            check_shape(name, vector, x.shape[1:2])
            if vector.dtype == at_least_float32(x.dtype):
                check_device(name, vector, "x", x)
            else:
                check_like(name, vector, "x", x)
    if residual is not None:
        check_type("residual", residual, Tensor)
        check_shape("residual", residual, x.shape)
        check_like("residual", residual, "x", x)
    backend = backend or AUTO
    if training:
        stats = _batch_stats(x.detach(), running_mean, running_var, momentum, backend)
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: got None, expected tensors unless training")
    else:
        stats = torch.stack([running_mean, running_var])
    y: Tensor
    if _wants_grad(x, weight, bias, residual):
        y = GeluBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, stats, residual, training, eps, backend
        )
    else:
        y = _ops.gelu_batch_norm(x, stats, weight, bias, residual, eps, backend)
    return y


def _batch_stats(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    backend: str,
) -> Tensor:
    """Mean and biased variance of GELU(x); moves the running ones, whose variance is unbiased."""
    count = x.numel() // max(x.shape[1], 1)
    if count < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected 2 values per channel to train")
    stats: Tensor = _ops.gelu_stats(x, backend)
    if running_mean is not None:
        running_mean.lerp_(stats[0].to(running_mean), momentum)
    if running_var is not None:
        unbiased = stats[1] * (count / (count - 1))
        running_var.lerp_(unbiased.to(running_var), momentum)
    return stats


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
    if (
        torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
        and x.dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
    return x, values, bias


def _check_operands(x: Tensor, values: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
    check_like("weight", values, "x", x)
    if bias is not None:
        check_type("bias", bias, Tensor)
        check_shape("bias", bias, shape[:1])
        check_like("bias", bias, "x", x)


def _check_weight(values: Tensor, source: str, shape: Sequence[int], dim: int) -> None:
    """``shape`` is that of the mask or scores; only a dense weight has a shape of its own."""
    if len(shape) != dim:
        raise ValueError(f"{source}: got shape {tuple(shape)}, expected {dim} dimensions")
    if values.dim() != 1:
        check_shape("weight", values, shape)


def _check_linear(x: Tensor, values: Tensor, source: str, shape: Sequence[int]) -> None:
    _check_weight(values, source, shape, dim=2)
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected (..., {shape[1]}) for {source} {tuple(shape)}"
        )


def _check_conv2d(
    x: Tensor,
    values: Tensor,
    source: str,
    shape: Sequence[int],
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
) -> tuple[Tensor, tuple[list[int], list[int], list[int], int]]:
    """x as the op takes it (batched, padded), and (stride, padding, dilation, groups)."""
    _check_weight(values, source, shape, dim=4)
    if x.dim() not in (3, 4):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, C, H, W) or (C, H, W)")
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    if groups < 1 or batch.shape[1] != shape[1] * groups or shape[0] % groups:
        raise ValueError(
            f"groups: got {groups} with {batch.shape[1]} channels and {source} {tuple(shape)}, "
            f"expected channels = groups * {shape[1]} and {shape[0]} outputs divisible by groups"
        )
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    batch, paddings = _resolve_padding(batch, padding, shape[2:], strides, dilations)
    for size, kernel, pad, gap in zip(batch.shape[2:], shape[2:], paddings, dilations, strict=True):
        if size + 2 * pad < gap * (kernel - 1) + 1:
            raise ValueError(
                f"x: got spatial size {tuple(batch.shape[2:])} with padding {tuple(paddings)}, "
                f"expected room for the kernel {tuple(shape[2:])} with dilation {tuple(dilations)}"
            )
    return batch, (strides, paddings, dilations, groups)


def _resolve_padding(
    x: Tensor,
    padding: IntOrPair | str,
    kernel: Sequence[int],
    stride: list[int],
    dilation: list[int],
) -> tuple[Tensor, list[int]]:
    """x and symmetric padding; ``"same"`` of an odd total pads x itself, right and bottom."""
    if not isinstance(padding, str):
        return x, pair("padding", padding, 0)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(
            f"padding: got {padding!r}, expected 'same', 'valid', an integer or a pair of integers"
        )
    if stride != [1, 1]:
        raise ValueError(f"padding: got 'same' with stride {tuple(stride)}, expected stride 1")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]


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


def _wants_grad(*tensors: Tensor | None) -> bool:
    """Whether to go through autograd, which costs microseconds, or straight to the op."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _tokens(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _over_tokens(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """``run``, of ``[M, K]``, for tensors of the dimensions of x."""
    return run if x.dim() == 2 else lambda x: _restore(run(_tokens(x)), x)


def _restore(y: Tensor, x: Tensor) -> Tensor:
    """``[M, N]`` back to the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
