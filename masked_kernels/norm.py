"""BatchNorm and the activation beside it as one function: validate, call the autograd.Function."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _ops
from ._checks import check_device, check_float, check_like, check_shape, check_type
from .autograd import BatchNormRelu, GeluBatchNorm, wants_grad
from .backends import AUTO
from .backends._layout import at_least_float32


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
    vectors = running_mean, running_var, weight, bias
    return _run(_GELU_BATCH_NORM, x, *vectors, training, momentum, eps, residual, backend)


def batch_norm_relu(
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
    """``F.relu(F.batch_norm(x, ...) + residual)``, which keeps x and, with a residual, the result
    for the backward.

    Arguments, result and errors are those of ``gelu_batch_norm``.
    """
    vectors = running_mean, running_var, weight, bias
    return _run(_BATCH_NORM_RELU, x, *vectors, training, momentum, eps, residual, backend)


class _Norm(NamedTuple):
    """Its autograd.Function and its ops."""

    function: type[Function]
    stats: Callable[..., Tensor]
    forward: Callable[..., Tensor]


_GELU_BATCH_NORM = _Norm(GeluBatchNorm, _ops.gelu_stats, _ops.gelu_batch_norm)
_BATCH_NORM_RELU = _Norm(BatchNormRelu, _ops.batch_norm_stats, _ops.batch_norm_relu)


def _run(
    norm: _Norm,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    backend: str | None,
) -> Tensor:
    _check_norm(x, running_mean, running_var, weight, bias, residual)
    backend = backend or AUTO
    stats = _stats(norm.stats, x, running_mean, running_var, training, momentum, backend)
    if not wants_grad(x, weight, bias, residual):
        return norm.forward(x, stats, weight, bias, residual, eps, backend)
    y: Tensor = norm.function.apply(x, weight, bias, stats, residual, training, eps, backend)
    return y


def _check_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
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


def _stats(
    op: Callable[[Tensor, str], Tensor],
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    backend: str,
) -> Tensor:
    """Mean and biased variance: when training by ``op``, and the running ones, of which the
    variance is unbiased, move; else these.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "running_mean, running_var: got None, expected tensors unless training"
            )
        return torch.stack([running_mean, running_var])
    count = x.numel() // max(x.shape[1], 1)
    if count < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected 2 values per channel to train")
    stats = op(x.detach(), backend)
    mean, var = stats
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean), momentum)
    if running_var is not None:
        unbiased = var * (count / (count - 1))
        running_var.lerp_(unbiased.to(running_var), momentum)
    return stats
