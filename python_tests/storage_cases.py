"""Small models for the tests of saving and loading."""

from collections import Counter

import torch
from torch import Tensor, nn

import masked_kernels as mk

RECIPES = {
    "edge_popup": mk.recipes.edge_popup(),
    "one_layer": mk.recipes.one_layer(),
    "max_layer_padding": mk.recipes.max_layer_padding(),
    "random_padding": mk.recipes.random_padding(1e-1),
    "rand": mk.recipes.random_padding(1e-1, mode="rand"),
    "two of four": mk.recipes.edge_popup(rule=mk.NM(2, 4)),
    "seeded edge_popup": mk.recipes.edge_popup(seeded=True, weight_init="signed_constant"),
    "seeded one_layer": mk.recipes.one_layer(seeded=True),
    "seeded random_padding": mk.recipes.random_padding(1e-1, seeded=True),
    "seeded rand": mk.recipes.random_padding(1e-1, mode="rand", seeded=True),
    "self_masking": mk.MaskConfig(mk.Threshold(0.0, rescale=True), values="pretrained"),
}


class Small(nn.Module):
    """Convolution, normalisation, a plain layer, a buffer of its own, biases."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, (1, 3), groups=2, padding="same", bias=False)
        self.plain = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("offset", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x)).relu()).mean((2, 3))
        return self.head(self.plain(x)) + self.offset


def small(width: int = 6, recipe: str | None = "random_padding", seed: int = 0) -> nn.Module:
    """A Small model whose normalisation has seen data; ``recipe=None`` leaves it plain."""
    torch.manual_seed(seed)
    model = Small(width)
    if recipe is not None:
        mk.mask_model_(model, RECIPES[recipe], filter_fn=lambda name, _: name != "plain", seed=seed)
    model(torch.randn(4, 3, 7, 5))
    return model.eval()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(7)).to(dtype)


def drop_masked_(model: nn.Module) -> None:
    """Set masked values to 0 in dense weights that no other layer shares: files leave them out."""
    layers = [m for m in model.modules() if getattr(m, "weight", None) is not None]
    users = Counter(id(layer.weight) for layer in layers)
    for layer in layers:
        if hasattr(layer, "mask") and users[id(layer.weight)] == 1:
            layer.weight.masked_fill_(~layer.mask.unpack(), 0)


def bits(model: nn.Module) -> dict[str, bytes]:
    """The whole state, byte for byte."""
    return {
        name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in model.state_dict().items()
    }
