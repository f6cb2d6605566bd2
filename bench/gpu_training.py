"""One training step of ConvMixer in bfloat16 autocast: masked, dense, and masked as published."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk

NAMES = ("ours", "dense", "published")


class _TopKStraightThrough(torch.autograd.Function):
    """The mask of edge-popup and PEMN as published: a full sort, then two indexed writes."""

    @staticmethod
    def forward(ctx: object, scores: Tensor) -> Tensor:
        mask = scores.clone()
        order = scores.flatten().sort().indices
        drop = scores.numel() // 2
        flat = mask.flatten()
        flat[order[:drop]] = 0
        flat[order[drop:]] = 1
        return mask

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class PublishedConv2d(nn.Module):
    """A convolution of frozen weights and trained scores that forms ``w * mask`` in each step."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight.detach())
        self.scores = nn.Parameter(torch.randn_like(conv.weight))
        self.options = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * _TopKStraightThrough.apply(self.scores.abs())
        return F.conv2d(x, weight, None, *self.options)


def build(
    name: str, device: str, backend: str, batch: int = 512, dim: int = 256, depth: int = 8
) -> Callable[[], Tensor]:
    """A function that takes one step and returns the loss."""
    torch.manual_seed(0)
    model: nn.Module = mk.models.create_model("convmixer", dim=dim, depth=depth)
    if name == "ours":
        mk.mask_model_(model, mk.recipes.random_padding(1e-2))
    elif name == "published":
        convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        for path in convolutions:
            model.set_submodule(path, PublishedConv2d(model.get_submodule(path)))
    model.to(device, memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(10, (batch,), device=device)

    def step() -> Tensor:
        with mk.use_backend(backend if name == "ours" else "auto"):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step
