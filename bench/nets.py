"""The networks of PEMN's tables and the ways to build each: masked, dense, and as published."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk

from .problem import channels_last
from .providers import published, unfused_

RATE = 1e-3
"""Of the steps: small, so that timing does not train the network away from where it was checked."""
IMAGE = (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True)
class Net:
    """A model of the registry and its batch.

    Args:
        title: for people.
        model, arguments: of ``mk.models.create_model``.
        batch: the paper's.
        cpu_batch: what 24 GB hold of the dearest way to build it; 0 for a network that is measured
            on GPUs alone.
    """

    title: str
    model: str
    batch: int
    cpu_batch: int = 0
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def create(self) -> nn.Module:
        """The plain model, always of the same numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return mk.models.create_model(self.model, **self.arguments)


_NO_DROPOUT = MappingProxyType({"dropout": 0.0})  # results of all ways must be comparable

GPU_NETS = (
    Net("ConvMixer-256/6", "convmixer_256_6", 512, 512),
    Net("ConvMixer-256/8", "convmixer_256_8", 512, 512),
    Net("ConvMixer-512/6", "convmixer_512_6", 512),
    Net("ConvMixer-512/8", "convmixer_512_8", 512, 256),
    Net("ViT-256/6", "vit_256_6", 256, 256, _NO_DROPOUT),
    Net("ViT-256/8", "vit_256_8", 256, arguments=_NO_DROPOUT),
    Net("ViT-512/6", "vit_512_6", 256, arguments=_NO_DROPOUT),
    Net("ViT-512/8", "vit_512_8", 256, 256, _NO_DROPOUT),
    Net("ResNet-20", "resnet20", 256),
    Net("ResNet-32", "resnet32", 256, 256),
    Net("ResNet-56", "resnet56", 256, 256),
    Net("ResNet-18", "resnet18", 256, 128),
    Net("ResNet-34", "resnet34", 256),
    Net("ResNet-50", "resnet50", 256),
)
NETS = tuple(net for net in GPU_NETS if net.cpu_batch)

TOYS = (
    Net("ConvMixer-8/1", "convmixer", 4, 4, {"dim": 8, "depth": 1}),
    Net("ViT-8/1", "vit", 4, 4, {"dim": 8, "depth": 1, "mlp_dim": 16, **_NO_DROPOUT}),
    Net("ResNet-6", "resnet", 4, 4, {"depths": (1, 1), "width": 8}),
)
"""One of each family, for tests and to warm up."""

RECOMPUTED = "ours, recomputed norms"
RECIPES = {
    "ours": mk.recipes.random_padding(1e-2),
    "ours, mask": mk.recipes.edge_popup(),
    RECOMPUTED: mk.recipes.random_padding(1e-2),
}
FUSED_NORMS = "dense, fused norms"
WAYS = (*RECIPES, "dense eager", FUSED_NORMS, "published layer")
"""``ours`` is random_padding(1e-2), ``ours, mask`` has a dense weight; the published layer writes
its weight out and so costs the same for both. Fused norms are those of this package's
``FusedSequential``, in a dense network, and recomputed ones ``mk.nn.recompute_norms``.
"""


def ways(net: Net, device: str = "cpu") -> tuple[str, ...]:
    """Those that differ from one another: ResNets recompute nothing, and on GPUs fuse nothing."""
    if "convmixer" in net.model:
        return WAYS
    fuses = "resnet" in net.model and device == "cpu"
    return tuple(way for way in WAYS if "norms" not in way or (way == FUSED_NORMS and fuses))


def masked(net: Net, config: mk.MaskConfig, device: str = "cpu") -> nn.Module:
    """Always of the same numbers; no two scores of a layer tie, for the published layer's sort is
    not stable, and one other bit in a mask is another network.
    """
    model = net.create()
    mk.mask_model_(model, config, seed=0)
    model.to(device)
    for scores in _scores(model):
        flat = scores.data.flatten()
        rank = flat.abs().argsort(stable=True).argsort()
        magnitude = flat.abs().max() * (1 + rank) / flat.numel()
        scores.data = torch.copysign(magnitude, flat).view_as(scores)
    return model


def build(net: Net, way: str, device: str = "cpu") -> nn.Module:
    """The network for channels_last images, ready to train.

    Args:
        way: one of ``WAYS``.
    """
    if way in RECIPES:
        return masked(net, RECIPES[way], device)
    if way == "published layer":
        return published(masked(net, RECIPES["ours"], device))
    model = net.create().to(device, memory_format=torch.channels_last)
    return unfused_(model) if way == "dense eager" else model


def training_step(
    model: nn.Module,
    labels: Tensor,
    backend: str,
    autocast: torch.dtype | None = None,
    recompute: bool = False,
) -> Callable[[Tensor], Tensor]:
    """A step of SGD on images: gradients to None, forward, cross entropy, backward, update. It
    returns the loss and leaves its gradients.
    """
    keeping = mk.nn.recompute_norms if recompute else contextlib.nullcontext
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE)

    def run(x: Tensor) -> Tensor:
        # Without the cache of casts, which a CUDA graph would read when it is gone.
        cast = torch.autocast(x.device.type, autocast, autocast is not None, cache_enabled=False)
        with mk.use_backend(backend):
            optimizer.zero_grad()
            with mk.nn.select_together(model), keeping(), cast:
                loss = F.cross_entropy(model(channels_last(x)), labels[: len(x)])
            loss.backward()
            optimizer.step()
        return loss.detach()

    return run


def masked_weights(net: Net) -> int:
    """How many weights a mask covers."""
    model = net.create()
    mk.mask_model_(model, RECIPES["ours"])
    return sum(scores.numel() for scores in _scores(model))


def _scores(model: nn.Module) -> list[nn.Parameter]:
    layers = (mk.nn.MaskedLinear, mk.nn.MaskedConv2d)
    return [module.scores for module in model.modules() if isinstance(module, layers)]
