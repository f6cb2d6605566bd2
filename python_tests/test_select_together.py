"""One selection for a model: the masks and gradients of a selection in each forward."""

import pytest
import torch
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels import _ops

RULES = (mk.TopK(0.3), mk.Threshold(0.1, rescale=True), mk.TopK(0.3), mk.NM(2, 4))


def small() -> nn.Sequential:
    layers: list[nn.Module] = [
        mk.nn.MaskedConv2d(3, 8, 3, padding=1, rule=RULES[0]),
        mk.nn.MaskedConv2d(8, 8, 1, rule=RULES[1]),
        nn.Flatten(),
        mk.nn.MaskedLinear(8 * 25, 12, rule=RULES[2]),
        mk.nn.MaskedLinear(12, 4, rule=RULES[3]),
    ]
    return nn.Sequential(*layers)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.logsumexp(1).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_same_steps(backend: str) -> None:
    model, x = small(), torch.randn(2, 3, 5, 5)
    with mk.use_backend(backend):
        alone = step(model, x)
        with mk.nn.select_together(model):
            together = step(model, x)
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got, expected)


def test_one_call_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str):
        op = getattr(_ops, name)
        return lambda *args: (calls.append(name), op(*args))[1]

    for name in ("select_topk", "select_topk_many", "select_threshold", "select_nm"):
        monkeypatch.setattr(_ops, name, counted(name))
    model, x = small(), torch.randn(2, 3, 5, 5)
    with mk.nn.select_together(model):
        assert sorted(calls) == ["select_nm", "select_threshold", "select_topk_many"]
        step(model, x)
        assert len(calls) == 3
    step(model, x)
    assert len(calls) == 3 + len(RULES)


def test_masks_are_those_on_entry() -> None:
    model, x = small(), torch.randn(2, 3, 5, 5)
    first = model(x)
    with mk.nn.select_together(model):
        with torch.no_grad():
            model[0].scores.neg_().add_(1)
        assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = small()
    with pytest.raises(KeyError), mk.nn.select_together(model):
        raise KeyError
    assert all(getattr(layer, "selected", None) is None for layer in model)


def test_nan_is_named() -> None:
    model = small()
    with torch.no_grad():
        model[3].scores[1, 2] = float("nan")
    with (
        mk.use_backend("reference"),
        pytest.raises(ValueError, match=r"scores\[1\]: NaN at flat index 202"),
        mk.nn.select_together(model),
    ):
        pass
