"""MaskConfig: how ``mask_model_`` turns a plain model into a masked one."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .._checks import check_type
from ..rules import NM, Rule, TopK
from ._init import SCORE_INITS, WEIGHT_INITS

VALUES = ("pretrained", "random", "one_layer", "max_layer_padding", "random_padding")
MODES = ("copy", "rand")


@dataclass(frozen=True)
class MaskConfig:
    """What the frozen values are, which rule makes the mask, how scores start, and what trains
    beside them.

    Args:
        rule: TopK, Threshold or NM, for every layer on its own.
        values: ``pretrained`` keeps each layer's weight; ``random`` draws each anew; ``one_layer``
            draws one weight per distinct shape; ``max_layer_padding`` draws the largest layer and
            gives every layer its prefix; ``random_padding`` repeats the first ``prototype_period``
            values of that draw (PEMN, sections 3.3 and 3.4).
        ratio: prototype length over the largest layer, in (0, 1]; for ``random_padding`` only.
        align: let ``random_padding`` pick a period near the exact one that suits the row length of
            most weights.
        mode: how ``random_padding`` fills: ``copy`` repeats the vector as it is; ``rand`` repeats
            it to the length of the largest layer and permutes the result once for all layers (the
            released PEMN code's option). The file stores the short vector and the permutation's
            seed; in memory and to the kernels it is as long as the largest layer.
        weight_init: what weights are drawn from (edge-popup, section 4), with ``fan_in`` inputs to
            an output: ``kaiming_normal`` (std ``sqrt(2 / fan_in)``), ``kaiming_uniform`` (up to
            ``sqrt(6 / fan_in)``) or ``signed_constant`` (``sqrt(2 / fan_in)``, half of them
            negative).
        scale_fan: draw with ``fan_in * density`` for ``fan_in``, the inputs that a mask leaves.
        seeded: draw weights by ``Draw`` (docs/draws.md) instead of torch's generators. They are
            other numbers, the same on every machine, and a file stores their seed for them.
        score_init: ``kaiming_uniform`` or ``kaiming_normal`` (both a = sqrt(5)), or a number that
            every score starts at.
        train_norm: leave the affine parameters of normalisation layers trainable; False freezes
            them.
        train_bias: leave the biases of masked layers trainable; False freezes them.
    """

    rule: Rule = field(default_factory=TopK)
    values: str = "random"
    ratio: float | None = None
    align: bool = False
    mode: str = "copy"
    weight_init: str = "kaiming_normal"
    scale_fan: bool = False
    seeded: bool = False
    score_init: str | float = "kaiming_uniform"
    train_norm: bool = True
    train_bias: bool = False

    def __post_init__(self) -> None:
        check_type("rule", self.rule, Rule)
        _check_one_of("values", self.values, VALUES)
        _check_one_of("mode", self.mode, MODES)
        _check_one_of("weight_init", self.weight_init, WEIGHT_INITS)
        if isinstance(self.score_init, str):
            _check_one_of("score_init", self.score_init, SCORE_INITS, " or a number")
        if self.values == "random_padding":
            if self.ratio is None or not 0.0 < self.ratio <= 1.0:
                raise ValueError(
                    f"ratio: got {self.ratio}, expected a number in (0, 1] for random_padding"
                )
        else:
            self._check_unused("random_padding only", "ratio", "align", "mode")
        if self.values == "pretrained":
            self._check_unused("values that are drawn", "weight_init", "scale_fan", "seeded")
        if self.align and self.mode == "rand":
            raise ValueError("align: got True with mode='rand', expected it for mode='copy' only")
        if self.scale_fan and not isinstance(self.rule, TopK | NM):
            raise ValueError(
                f"scale_fan: got True with {self.rule}, expected a rule of known density"
            )

    @property
    def fan_density(self) -> float:
        """What ``fan_in`` is multiplied by where weights are drawn."""
        return self.rule.density if self.scale_fan and isinstance(self.rule, TopK | NM) else 1.0

    @property
    def makes_prototypes(self) -> bool:
        """Whether masked layers read a Prototype and have no weight of their own."""
        if self.values in ("random", "one_layer"):
            return self.seeded
        return self.values != "pretrained"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; ``from_dict`` reads them back."""
        return {**asdict(self), "rule": self.rule.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MaskConfig":
        return cls(**{**fields, "rule": Rule.from_dict(fields["rule"])})

    def _check_unused(self, use: str, *names: str) -> None:
        """Raise unless the fields have their defaults, which are the class's attributes."""
        for name in names:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(
                    f"{name}: got {value!r} with values={self.values!r}, expected it for {use}"
                )


def _check_one_of(name: str, value: str, names: tuple[str, ...], other: str = "") -> None:
    if value not in names:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(names)}{other}")
