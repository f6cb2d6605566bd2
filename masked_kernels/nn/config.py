"""MaskConfig: how ``mask_model_`` turns a plain model into a masked one."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .._checks import check_type
from ..rules import Rule, TopK

VALUES = ("pretrained", "random", "one_layer", "max_layer_padding", "random_padding")


@dataclass(frozen=True)
class MaskConfig:
    """What the frozen values are, which rule makes the mask, how scores start, and what trains
    beside them.

    Args:
        rule: TopK, Threshold or NM, for every layer on its own.
        values: ``pretrained`` keeps each layer's weight; ``random`` draws each kaiming normal (std
            ``sqrt(2 / fan_in)``); ``one_layer`` draws one weight per distinct shape;
            ``max_layer_padding`` draws the largest layer and gives every layer its prefix;
            ``random_padding`` repeats the first ``prototype_period`` values of that draw (PEMN,
            sections 3.3 and 3.4).
        ratio: prototype length over the largest layer, in (0, 1]; for ``random_padding`` only.
        align: let ``random_padding`` pick a period near the exact one that suits the row length of
            most weights.
        score_init: ``"kaiming_uniform"`` (a = sqrt(5)) or a number that every score starts at.
        train_norm: leave the affine parameters of normalisation layers trainable; False freezes
            them.
        train_bias: leave the biases of masked layers trainable; False freezes them.
    """

    rule: Rule = field(default_factory=TopK)
    values: str = "random"
    ratio: float | None = None
    align: bool = False
    score_init: str | float = "kaiming_uniform"
    train_norm: bool = True
    train_bias: bool = False

    def __post_init__(self) -> None:
        check_type("rule", self.rule, Rule)
        if self.values not in VALUES:
            raise ValueError(f"values: got {self.values!r}, expected one of {', '.join(VALUES)}")
        if self.values == "random_padding":
            if self.ratio is None or not 0.0 < self.ratio <= 1.0:
                raise ValueError(
                    f"ratio: got {self.ratio}, expected a number in (0, 1] for random_padding"
                )
        elif self.ratio is not None or self.align:
            raise ValueError(
                f"ratio, align: got {self.ratio}, {self.align} with values={self.values!r}, "
                "expected them for random_padding only"
            )
        if isinstance(self.score_init, str) and self.score_init != "kaiming_uniform":
            raise ValueError(
                f"score_init: got {self.score_init!r}, expected 'kaiming_uniform' or a number"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; ``from_dict`` reads them back."""
        return {**asdict(self), "rule": self.rule.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MaskConfig":
        return cls(**{**fields, "rule": Rule.from_dict(fields["rule"])})
