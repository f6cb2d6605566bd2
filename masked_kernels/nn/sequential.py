"""A Sequential that runs what follows one another as one function."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import why_unavailable
from ..functional import gelu_batch_norm
from .recompute import remember


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` in which GELU followed by BatchNorm2d is ``gelu_batch_norm`` where that
    moves fewer bytes: on float32 channels_last images on the CPU, and on GPUs where Triton is.

    Children, state and results are those of ``nn.Sequential``. Layers with hooks of their own are
    called one by one, and a compiled model is left to the compiler, which fuses them itself.
    ``fuse = False`` calls all layers one by one.
    """

    fuse: bool = True

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The last layer's output, plus ``residual`` of the same shape."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and self.fuse and _fuses(layer, layers[0], input):
                norm, added = layers.pop(0), None
                if not layers and residual is not None and residual.dtype == input.dtype:
                    added, residual = residual, None
                input = _gelu_batch_norm(input, norm, added)
            else:
                input = layer(input)
        return input if residual is None else input + residual


class Residual(FusedSequential):
    """``x + f(x)``, f being the modules in turn."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(input, input if residual is None else input + residual)


def _fuses(gelu: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(gelu) is nn.GELU
        and gelu.approximate == "none"
        and type(norm) is nn.BatchNorm2d
        and x.dim() == 4
        and (_runs_on_cpu(x) if x.device.type == "cpu" else _runs_on_gpu(x))
        and all(t.dtype == torch.float32 for t in norm.parameters())
        and x.numel() > x.shape[1]  # else BatchNorm2d refuses to train, in its own words
        and not (has_hooks(gelu) or has_hooks(norm))
    )


def _runs_on_cpu(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and why_unavailable("cpu") is None
    )


def _runs_on_gpu(x: Tensor) -> bool:
    return (
        x.device.type == "cuda"
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


def _gelu_batch_norm(x: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
    """``norm(F.gelu(x)) + residual``, with what ``BatchNorm2d.forward`` does about its buffers."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1 / float(norm.num_batches_tracked)
    y = gelu_batch_norm(
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
    remember(y, norm.bias, residual)
    return y
