"""One training step of ConvMixer in bfloat16 autocast: masked, dense, and masked as published."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk

from .providers import published, unfused_

NAMES = ("ours", "dense", "published")


def build(
    name: str, device: str, backend: str, batch: int = 512, dim: int = 256, depth: int = 8
) -> Callable[[], Tensor]:
    """A function that takes one step and returns the loss."""
    torch.manual_seed(0)
    model: nn.Module = mk.models.create_model("convmixer", dim=dim, depth=depth)
    if name != "dense":
        mk.mask_model_(model, mk.recipes.random_padding(1e-2))
    if name == "dense":
        model = unfused_(model)
    if name == "published":
        model = published(model)
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
