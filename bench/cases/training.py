"""Training: steps of a network, and one layer forward and backward."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import masked_kernels as mk

from ..nets import (
    CLASSES,
    IMAGE,
    NETS,
    RECIPES,
    RECOMPUTED,
    TOYS,
    Net,
    build,
    masked,
    training_step,
    ways,
)
from ..problem import Case, ErrorOf, Judge, Problem, Provider, channels_last, error_against
from ..providers import published
from .network import masked_convmixer, multiply_adds

CHECKED = 4
"""Images; the float64 gradients of more take minutes."""


@dataclass(frozen=True)
class TrainingStep(Case):
    """A step of SGD on one batch: gradients to None, forward, cross entropy, backward, update.

    Scores, norms and whatever else no mask covers train; the dense network trains its weights too.
    """

    net: Net
    batch: int
    group: ClassVar[str] = "training"

    @property
    def name(self) -> str:
        return f"training step {self.net.title} batch={self.batch}"

    def facts(self) -> dict[str, Any]:
        return {"model": self.net.model, "batch": self.batch, "paper_batch": self.net.batch}

    def build(self, backend: str) -> Problem:
        inputs, labels = _batches(self.batch)

        def provider(way: str) -> Provider:
            exact = {"ours, mask": lambda: published(masked(self.net, RECIPES[way]))}
            if way.startswith("dense"):
                exact[way] = lambda: build(self.net, "dense eager")
            judge = _gradients_of(exact[way], labels) if way in exact else None
            step = _step(build(self.net, way), labels, backend, recompute=way == RECOMPUTED)
            return Provider(step, judge=judge)

        names = ways(self.net)
        return Problem(
            inputs,
            {way: functools.partial(provider, way) for way in names},
            _gradients_of(lambda: build(self.net, "published layer"), labels),
            dense=tuple(way for way in names if way.startswith("dense")),
            multiply_adds=3 * multiply_adds(lambda: self.net.create()(inputs[0][:1])) * self.batch,
            trains=True,
            checked=_checked(self.net, inputs[0]),
        )


@dataclass(frozen=True)
class AlignedStep(Case):
    """``TrainingStep`` of a ConvMixer with an aligned prototype, whose products are fast."""

    dim: int
    depth: int
    batch: int
    group: ClassVar[str] = "training"

    @property
    def name(self) -> str:
        return f"training step ConvMixer-{self.dim}/{self.depth} aligned batch={self.batch}"

    def build(self, backend: str) -> Problem:
        inputs, labels = _batches(self.batch)

        def ours() -> nn.Module:
            return masked_convmixer(self.dim, self.depth)

        def as_published() -> nn.Module:
            return published(ours())

        def dense() -> nn.Module:
            arguments = {"dim": self.dim, "depth": self.depth}
            return build(Net("", "convmixer", self.batch, self.batch, arguments), "dense eager")

        return Problem(
            inputs,
            {
                "ours": lambda: Provider(_step(ours(), labels, backend)),
                "dense eager": lambda: Provider(
                    _step(dense(), labels, backend), judge=_gradients_of(dense, labels)
                ),
                "published layer": lambda: Provider(_step(as_published(), labels, backend)),
            },
            _gradients_of(as_published, labels),
            dense=("dense eager",),
            multiply_adds=3 * multiply_adds(lambda: dense()(inputs[0])),
            trains=True,
            checked=inputs[0][:CHECKED],
        )


def _batches(batch: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Two batches of images, and labels for either."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(batch, *IMAGE, generator=generator) for _ in range(2))
    return inputs, torch.randint(CLASSES, (batch,), generator=generator)


class _Kinks(TorchFunctionMode):
    """Remembers how close to 0 the inputs of ReLU come."""

    nearest = math.inf

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.relu:
            self.nearest = min(self.nearest, float(args[0].detach().abs().min()))
        return func(*args, **(kwargs or {}))


def _checked(net: Net, images: Tensor) -> Tensor:
    """Some images; of a network with ReLU the two that keep furthest from where its gradient jumps,
    or rounding would decide which side they are on, and with it digits of the gradient.
    """
    model = build(net, "published layer").train()

    def distance(pair: Tensor) -> float:
        with _Kinks() as kinks, torch.no_grad():
            model(channels_last(pair))
        return kinks.nearest

    if distance(images[:2]) == math.inf:
        return images[:CHECKED]
    return max(images[: 8 * CHECKED].split(2), key=distance)


def _step(
    model: nn.Module, labels: Tensor, backend: str, recompute: bool = False
) -> Callable[[Tensor], nn.Module]:
    """A step that returns the model; its gradients are the step's."""
    step = training_step(model, labels, backend, recompute=recompute)

    def run(x: Tensor) -> nn.Module:
        step(x)
        return model

    return run


class UnfoldedDepthwise(TorchFunctionMode):
    """Float64 depthwise convolutions that keep the size, as sums over unfolded windows: PyTorch
    takes eight seconds for one such gradient of ConvMixer.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.conv2d and args[0].dtype == torch.float64 and args[1].shape[1] == 1:
            x, weight = args[:2]
            windows = F.unfold(x, weight.shape[2:], padding=weight.shape[2] // 2)
            taps = windows.unflatten(1, (x.shape[1], -1))  # [B, C, k * k, H * W]
            return torch.einsum("bcqt,cq->bct", taps, weight.flatten(1)).view_as(x)
        return func(*args, **(kwargs or {}))


def _gradients_of(make: Callable[[], nn.Module], labels: Tensor) -> Judge:
    """Judges the gradients of a first step by float64; plain PyTorch is float32 channels_last, in
    which its norms sum in another order than in NCHW.
    """

    def gradients(x: Tensor) -> Tensor:
        model = make().to(x.dtype).train()
        with UnfoldedDepthwise():
            F.cross_entropy(model(x), labels[: len(x)]).backward()
        return _flat_gradients(model)

    def judge(x: Tensor) -> ErrorOf:
        truth, plain = gradients(x.double()), gradients(channels_last(x))
        return error_against(truth, plain, _flat_gradients)

    return judge


@dataclass(frozen=True)
class TrainedLinear(Case):
    """Selection, product and gradients of x and scores of one masked ``[n, k]`` layer, whose
    aligned prototype is a row or less.
    """

    n: int
    k: int
    batch: int
    layer: str = ""
    group: ClassVar[str] = "trained_layer"

    @property
    def name(self) -> str:
        layer = f" ({self.layer})" if self.layer else ""
        return f"scored_linear {self.n}x{self.k} aligned batch={self.batch}, with backward{layer}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.k, generator=generator)
        grad_y = torch.randn(self.batch, self.n, generator=generator)
        config = mk.recipes.random_padding(1e-4, align=True)
        masked = nn.Sequential(nn.Linear(self.k, self.n, bias=False))
        mk.mask_model_(masked, config, seed=0)
        as_published = published(masked)

        def run(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
            trained = [p for p in model.parameters() if p.requires_grad]

            def backward(x: Tensor) -> list[Tensor]:
                with mk.use_backend(backend):
                    return list(torch.autograd.grad(model(x), [x, *trained], grad_y))

            return backward

        def judge(x: Tensor) -> ErrorOf:
            exact = published(masked).double()
            x64 = x.detach().double().requires_grad_()
            wanted = [x64, *(p for p in exact.parameters() if p.requires_grad)]
            truth = torch.autograd.grad(exact(x64), wanted, grad_y.double())
            return error_against(_flat(truth), _flat(run(as_published)(x)), _flat)

        def dense() -> Provider:
            layer = nn.Sequential(nn.Linear(self.k, self.n, bias=False))
            return Provider(run(layer), judge=_linear_gradients(layer[0].weight, grad_y))

        return Problem(
            (x.requires_grad_(),),
            {
                "ours": lambda: Provider(run(masked)),
                "dense eager": dense,
                "published layer": lambda: Provider(run(as_published)),
            },
            judge,
            dense=("dense eager",),
            multiply_adds=3 * self.n * self.k * self.batch,
            trains=True,
        )


def _linear_gradients(weight: Tensor, grad_y: Tensor) -> Judge:
    """Judges the gradients of x and weight of a dense linear layer."""

    def judge(x: Tensor) -> ErrorOf:
        def gradients(dtype: torch.dtype) -> Tensor:
            grad = grad_y.to(dtype)
            return _flat((grad @ weight.detach().to(dtype), grad.t() @ x.detach().to(dtype)))

        return error_against(gradients(torch.float64), gradients(torch.float32), _flat)

    return judge


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _flat_gradients(model: nn.Module) -> Tensor:
    return _flat(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)


CASES = (
    AlignedStep(256, 8, 64),
    *(TrainingStep(net, net.cpu_batch) for net in NETS),
    TrainedLinear(1536, 512, 65 * 64, "ViT-512 qkv"),
    TrainedLinear(512, 512, 65 * 64, "ViT-512 mlp"),
)
QUICK = CASES[:1]
TOY = (
    AlignedStep(8, 1, 4),
    *(TrainingStep(net, net.cpu_batch) for net in TOYS),
    TrainedLinear(16, 32, 8),
)
