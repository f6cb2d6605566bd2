"""A Sequential that runs what follows one another as one function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import is_watched
from ..backends import why_unavailable
from ..norm import batch_norm_relu, gelu_batch_norm
from .recompute import remember


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` in which GELU, BatchNorm2d is ``gelu_batch_norm`` and BatchNorm2d, ReLU is
    ``batch_norm_relu`` where that moves fewer bytes: on float32 channels_last images on the CPU,
    and the former on GPUs where Triton is.

    Children, state and results are those of ``nn.Sequential``. Layers with hooks of their own are
    called one by one, and so are all where a compiler, a tracer, a dispatch mode or a transform of
    ``torch.func`` watches. ``fuse = False`` calls all layers one by one.
    """

    fuse: bool = True

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: nn.Module | None = None
    ) -> Tensor:
        """The last layer's output, plus ``residual`` of the same shape, through ``activation``."""
        steps: list[Step] = list(self)
        if residual is not None:
            steps.append(_Add(residual))
        if activation is not None:
            steps.append(activation)
        is_proxy = not isinstance(input, Tensor)  # of torch.fx
        fuse = self.fuse and not is_proxy and not is_watched()
        while steps:
            fused = _fused(steps, input) if fuse else {}
            input = _run(fused, input) if fused else steps[0](input)
            del steps[: len(fused) or 1]
        return input


class Residual(FusedSequential):
    """``x + f(x)``, f being the modules in turn."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: nn.Module | None = None
    ) -> Tensor:
        residual = input if residual is None else input + residual
        return super().forward(input, residual, activation)


class _Add:
    def __init__(self, residual: Tensor) -> None:
        self.residual = residual

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.residual


Step = nn.Module | _Add
_FUNCTIONS: dict[tuple[type[Step], ...], Callable[..., Tensor]] = {
    (nn.GELU, nn.BatchNorm2d, _Add): gelu_batch_norm,
    (nn.GELU, nn.BatchNorm2d): gelu_batch_norm,
    (nn.BatchNorm2d, _Add, nn.ReLU): batch_norm_relu,
    (nn.BatchNorm2d, nn.ReLU): batch_norm_relu,
}
"""What steps of these types are as one."""
_FIRST = frozenset(types[0] for types in _FUNCTIONS)


def _fused(steps: list[Step], x: Tensor) -> dict[type[Step], Any]:
    """The first steps by their types, as many as are one function of ``x``; none where they are
    not.
    """
    for count in (3, 2) if type(steps[0]) in _FIRST else ():
        types = tuple(type(step) for step in steps[:count])
        if types in _FUNCTIONS:
            first = dict(zip(types, steps, strict=False))
            if _fuses(first, x):
                return first
    return {}


def _fuses(steps: dict[type[Step], Any], x: Tensor) -> bool:
    norm = steps[nn.BatchNorm2d]
    return (
        x.dim() == 4
        and (_runs_on_cpu(x) or (nn.GELU in steps and _runs_on_gpu(x)))
        and x.numel() > x.shape[1]  # else BatchNorm2d refuses to train, in its own words
        and (nn.GELU not in steps or steps[nn.GELU].approximate == "none")
        and (norm.weight is None or norm.weight.dtype == torch.float32)
        and (_Add not in steps or steps[_Add].residual.dtype == x.dtype)
        and not any(isinstance(step, nn.Module) and has_hooks(step) for step in steps.values())
    )


def _runs_on_cpu(x: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and why_unavailable("cpu") is None
    )


def _runs_on_gpu(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and why_unavailable("triton") is None
    )


def has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _run(fused: dict[type[Step], Any], x: Tensor) -> Tensor:
    """As one function, with what ``BatchNorm2d.forward`` does about its buffers."""
    norm = fused[nn.BatchNorm2d]
    residual = fused[_Add].residual if _Add in fused else None
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1 / float(norm.num_batches_tracked)
    y = _FUNCTIONS[tuple(fused)](
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training or norm.running_mean is None,
        0.0 if momentum is None else momentum,
        norm.eps,
        residual=residual,
    )
    if nn.GELU in fused:
        remember(y, norm.bias, residual)
    return y
