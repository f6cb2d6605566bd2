"""The papers' experiments under a name: ``pemn/convmixer-8-512/rp-1e-2``.

A preset is a net (model, data, training settings) and a row of the paper's tables (what becomes of
the weights). Every net goes with every row.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from .. import recipes
from ..nn.config import MaskConfig
from ..pruning import METHODS, SAVINGS, density_at_saving
from .augment import RandomCrop
from .settings import AUGMENTATIONS, Settings

# PEMN supplement A and the authors' README.
_CONVMIXER = Settings(
    epochs=100,
    batch_size=512,
    lr=0.05,
    weight_decay=0.005,
    augment=AUGMENTATIONS["convmixer"][0],
    erase=AUGMENTATIONS["convmixer"][1],
    amp="fp16",
)
# PEMN supplement A; it says nothing of augmentation.
_VIT = Settings(
    epochs=200,
    batch_size=256,
    lr=1e-4,
    weight_decay=0.0,
    optimizer="adam",
    schedule="cosine",
    augment=AUGMENTATIONS["vit"][0],
)
# PEMN supplement A, and edge-popup's code, which it follows.
_RESNET = Settings(
    epochs=100,
    batch_size=256,
    lr=0.1,
    weight_decay=5e-4,
    optimizer="sgd",
    momentum=0.9,
    schedule="cosine",
    augment=AUGMENTATIONS["crop-flip"][0],
)
_CIFAR = ("cifar10", "cifar100")


@dataclass(frozen=True)
class Net:
    """A model, the data it is for (the first is the default), and how it is trained."""

    model: str
    datasets: tuple[str, ...]
    settings: Settings
    model_args: dict[str, Any] = field(default_factory=dict)


NETS: dict[str, Net] = {
    # Handwritten digits know left from right: shifted by a pixel, never mirrored.
    "small/digits": Net(
        "convmixer",
        ("digits",),
        Settings(epochs=15, batch_size=64, lr=0.02, augment=RandomCrop(1)),
        {"dim": 256, "depth": 4, "kernel_size": 3, "patch_size": 2},
    ),
    "small/mnist": Net(
        "convmixer",
        ("mnist", "fashion_mnist"),
        Settings(epochs=5, batch_size=128, lr=0.02, augment=RandomCrop(2)),
        {"dim": 96, "depth": 4, "kernel_size": 5, "patch_size": 4},
    ),
    # The paper's optimizer for minutes on a CPU: a smaller model, fewer epochs, cheaper images.
    "small/cifar10": Net(
        "convmixer",
        ("cifar10",),
        Settings(epochs=10, batch_size=64, lr=0.02, augment=AUGMENTATIONS["crop-flip"][0]),
        {"dim": 96, "depth": 4, "kernel_size": 5, "patch_size": 4},
    ),
    **{
        f"pemn/{family}-{depth}-{dim}": Net(f"{family}_{dim}_{depth}", _CIFAR, settings)
        for family, settings in (("convmixer", _CONVMIXER), ("vit", _VIT))
        for depth in (6, 8)
        for dim in (256, 512)
    },
    **{
        f"pemn/resnet-{depth}": Net(f"resnet{depth}", _CIFAR, _RESNET)
        for depth in (18, 20, 32, 34, 50, 56)
    },
}


RECIPES = ("dense", "edge_popup", "one_layer", "max_layer_padding", "random_padding", *METHODS)


@dataclass(frozen=True)
class Row:
    """What becomes of the weights.

    Attributes:
        recipe: ``dense``, a function of ``masked_kernels.recipes``, or a method of
            ``masked_kernels.pruning``.
        density: fraction of the weights that a mask keeps.
        ratio: of ``random_padding``: period over the largest layer.
        align: of ``random_padding``: move the period to a fast one near.
        mask_args: further fields of MaskConfig.
    """

    recipe: str
    density: float = 0.5
    ratio: float = 1e-2
    align: bool = False
    mask_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: got {self.recipe!r}, expected one of {', '.join(RECIPES)}")

    def mask_config(self) -> MaskConfig | None:
        """Return how to mask a model; None for ``dense`` and pruned rows.

        Raises:
            ValueError: a value or a combination of them that MaskConfig has no use for.
        """
        arguments: dict[str, Any] = {"density": self.density, **self.mask_args}
        if self.recipe == "random_padding":
            return recipes.random_padding(self.ratio, align=self.align, **arguments)
        if self.recipe == "dense" or self.recipe in METHODS:
            return None
        config: MaskConfig = getattr(recipes, self.recipe)(**arguments)
        return config


DEFAULT_ROW = "rp-1e-2"

ROWS: dict[str, Row] = {
    "dense": Row("dense"),
    "mask": Row("edge_popup"),
    "one-layer": Row("one_layer"),
    "mp": Row("max_layer_padding"),
    **{
        f"rp-{ratio}": Row("random_padding", ratio=float(ratio))
        for ratio in ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5")
    },
    # The savings are of storage, index included; the supplement's labels read as if they were of
    # weights: the rows -rate.
    **{
        f"{method}-{saving:.0%}".rstrip("%") + suffix: Row(
            method, density_at_saving(saving, index_cost)
        )
        for suffix, index_cost in (("", 2.0), ("-rate", 0.0))
        for method in METHODS
        for saving in SAVINGS
    },
}


@dataclass(frozen=True)
class Preset:
    """A net and a row, by name. ``str`` gives ``NET/ROW``."""

    net: str
    row: str = DEFAULT_ROW

    def __str__(self) -> str:
        return f"{self.net}/{self.row}"

    @classmethod
    def parse(cls, name: str) -> "Preset":
        """Read ``NET/ROW``, or ``NET`` for its ``DEFAULT_ROW``.

        Raises:
            ValueError: unknown; says which nets and rows there are.
        """
        if name in NETS:
            return cls(name)
        net, _, row = name.rpartition("/")
        if net not in NETS or row not in ROWS:
            raise ValueError(
                f"unknown preset {name!r}, expected NET/ROW with NET one of {', '.join(NETS)} "
                f"and ROW one of {', '.join(ROWS)}"
            )
        return cls(net, row)


PRESETS: tuple[str, ...] = tuple(str(Preset(net, row)) for net in NETS for row in ROWS)


def find_net(dataset: str | None = None, model: str | None = None) -> str:
    """Return the name of the first net for this dataset and this kind of model, of those of one
    kind (``vit_256_6``: a ViT) this very model if there is one; None means any.

    Raises:
        ValueError: there is none.
    """
    names = [
        name
        for name, net in NETS.items()
        if (dataset is None or dataset in net.datasets)
        and (model is None or family(net.model) == family(model))
    ]
    if not names:
        raise ValueError(
            f"no preset for {model or 'any model'} on {dataset or 'any dataset'}; "
            f"give one: {', '.join(NETS)}"
        )
    return next((name for name in names if NETS[name].model == model), names[0])


def family(model: str) -> str:
    """Return the letters that a model's name starts with: ``resnet`` of ``resnet32``."""
    return re.split(r"[^a-z]", model, maxsplit=1)[0]
