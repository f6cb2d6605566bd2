"""A training step of a whole network: ours, the dense network, and the published masked layer."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk

from .problem import Problem, error_ratio, sort_and_scatter


@dataclass(frozen=True)
class TrainingStep:
    """ConvMixer on ``[batch, 3, size, size]`` channels_last float32: forward, backward, SGD.

    All networks have the same effective weights, and the learning rate is 0, so that they stay the
    same function. The result is the gradient of the first BatchNorm's weight: every layer takes
    part in it, forward and backward.
    """

    dim: int
    depth: int
    batch: int
    size: int = 32

    @property
    def name(self) -> str:
        return f"training step ConvMixer-{self.dim}/{self.depth} batch={self.batch}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(
            torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ours = mk.models.ConvMixer(dim=self.dim, depth=self.depth)
        mk.mask_model_(ours, mk.recipes.random_padding(1e-2, align=True))
        dense = _map(copy.deepcopy(ours), _dense)
        published = _map(copy.deepcopy(ours), _published)
        truth = copy.deepcopy(dense).double()

        our_step, dense_step, true_step = _step(ours), _step(dense), _step(truth)

        def on_backend(x: Tensor) -> Tensor:
            with mk.use_backend(backend):
                return our_step(x)

        return Problem(
            inputs,
            {"ours": on_backend, "dense": dense_step, "sort and scatter": _step(published)},
            lambda grad, x: error_ratio(grad, dense_step(x), true_step(x)),
            baseline="dense",
        )


def _step(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.to(memory_format=torch.channels_last).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)
    norm: Any = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))

    def step(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad()
            logits = model(x.to(norm.weight.dtype))
            F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)).backward()
            optimizer.step()
            grad: Tensor = norm.weight.grad
            return grad

    return step


class SortAndScatter(nn.Module):
    """A masked convolution or linear layer as edge-popup and PEMN publish it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer.to_plain()
        self.layer.weight = nn.Parameter(_unmasked(layer), requires_grad=False)
        self.scores = nn.Parameter(layer.scores.detach().clone())
        self.keep = layer.mask.count()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight * _StraightThrough.apply(self.scores.abs(), self.keep)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight)
        return self.layer._conv_forward(x, weight, None)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: int) -> Tensor:
        # Of a channels_last tensor the published code flattens a copy and masks nothing.
        return sort_and_scatter(scores.contiguous(), keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _unmasked(layer: Any) -> Tensor:
    values = layer.values
    return values.fill(layer.weight_shape) if isinstance(values, mk.Prototype) else values.detach()


def _dense(layer: Any) -> nn.Module:
    return layer.to_plain().requires_grad_()


def _published(layer: Any) -> nn.Module:
    return SortAndScatter(layer)


def _map(model: nn.Module, convert: Callable[[Any], nn.Module]) -> nn.Module:
    """``model`` with its masked layers converted, and without our fused containers."""
    for name, child in model.named_children():
        if isinstance(child, mk.nn.MaskedLinear | mk.nn.MaskedConv2d):
            setattr(model, name, convert(child))
        elif not isinstance(child, mk.Prototype):
            plain = nn.Sequential(*child) if isinstance(child, mk.nn.FusedSequential) else child
            setattr(model, name, _map(plain, convert))
    return model
