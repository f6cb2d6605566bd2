"""One selection for all masked layers of a model, in place of one in each forward."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..rules import Rule, Selected
from .masked import MaskedConv2d, MaskedLinear


@contextlib.contextmanager
def select_together(model: nn.Module) -> Iterator[None]:
    """Find the masks of a model's MaskedLinear and MaskedConv2d now, in one call for each rule, and
    have their forwards use them inside.

    Many small selections cost a GPU, and the host that launches them, more than one large one. The
    forwards of a training step belong inside, and what changes scores outside: inside it would not
    be noticed. Not for models under ``torch.compile``, which would compile every step anew.

    Raises ``ValueError`` if a score is NaN, as rules do.
    """
    layers: dict[Rule, list[MaskedLinear | MaskedConv2d]] = {}
    for module in model.modules():
        if isinstance(module, MaskedLinear | MaskedConv2d) and module.holds_all_scores:
            layers.setdefault(module.rule, []).append(module)
    try:
        for rule, together in layers.items():
            words = rule.select_many([layer.scores for layer in together])
            for layer, mask in zip(together, words, strict=True):
                layer.selected = Selected(rule, mask)
        yield
    finally:
        for layer in (layer for together in layers.values() for layer in together):
            layer.selected = None
