"""Initial weights and scores: edge-popup's distributions, from torch's generators or a Draw."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..draw import Draw

WEIGHT_INITS = ("kaiming_normal", "kaiming_uniform", "signed_constant")
SCORE_INITS = ("kaiming_uniform", "kaiming_normal")


def stream(seed: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, layer, purpose)."""
    entropy = np.random.SeedSequence([seed, index, *purpose.encode()])
    return torch.Generator().manual_seed(
        int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def _weight_distribution(init: str, fan: float) -> tuple[str, float]:
    """``Draw``'s distribution and scale for weights of ``fan`` kept inputs before a ReLU."""
    std = math.sqrt(2.0) / math.sqrt(fan or 1.0)
    if init == "kaiming_uniform":
        return "uniform", math.sqrt(3.0) * std
    return ("normal" if init == "kaiming_normal" else "sign"), std


def weight_draw(shape: Sequence[int], init: str, density: float, seed: int, index: int) -> Draw:
    """The draw of a whole weight of ``shape``, in the stream of layer ``index``.

    ``density`` multiplies the fan-in; 1 leaves it out of account.
    """
    distribution, scale = _weight_distribution(init, density * math.prod(shape[1:]))
    return Draw(seed, index, distribution, scale, math.prod(shape))


def draw_weight(
    shape: Sequence[int], init: str, density: float, generator: torch.Generator
) -> Tensor:
    """A weight of that distribution from torch's generator, float32 on the CPU."""
    distribution, scale = _weight_distribution(init, density * math.prod(shape[1:]))
    weight = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    if distribution == "uniform":
        return weight.uniform_(-scale, scale, generator=generator)
    weight.normal_(0.0, scale, generator=generator)
    return weight if distribution == "normal" else torch.full_like(weight, scale).copysign_(weight)


def draw_scores(weight: Tensor, init: str | float, generator: torch.Generator) -> nn.Parameter:
    """Drawn on the CPU in float32, so that a seed means the same on every device."""
    if not isinstance(init, str):
        scores = torch.full(weight.shape, init, dtype=torch.float32)
    else:
        scores = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        fill = nn.init.kaiming_uniform_ if init == "kaiming_uniform" else nn.init.kaiming_normal_
        fill(scores, a=math.sqrt(5), generator=generator)
    return nn.Parameter(scores.to(weight.device, weight.dtype))
