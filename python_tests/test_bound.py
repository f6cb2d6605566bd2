"""A call like the one before goes to its kernel at once, and any other call does not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.functional import compact_linear

N, K = 130, 64  # rows enough for the binary product


def fresh(mask: mk.PackedMask) -> mk.PackedMask:
    """The same mask that knows of no call."""
    return mk.PackedMask(mask.words, mask.shape)


@pytest.fixture
def mask() -> mk.PackedMask:
    return mk.TopK()(torch.randn(N, K))


@pytest.fixture
def conv_mask() -> mk.PackedMask:
    return mk.TopK()(torch.randn(4, 2, 3, 3))


WEIGHTS: dict[str, Callable[[], Any]] = {
    "dense": lambda: torch.randn(N, K),
    "aligned": lambda: mk.Prototype(torch.randn(K)),
    "rows": lambda: mk.Prototype(torch.randn(2 * K)),
    "any": lambda: mk.Prototype(torch.randn(45)),
}


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear_again(
    weight: str, lead: tuple[int, ...], mask: mk.PackedMask, backend: str, refused: list[str]
) -> None:
    made, bias, scale = WEIGHTS[weight](), torch.randn(N), torch.tensor(0.5)
    with mk.use_backend(backend):
        first, second = torch.randn(*lead, K), torch.randn(*lead, K)
        mk.masked_linear(first, made, mask, bias, scale=scale)
        refused.append("masked_linear")
        bound, again = (mk.masked_linear(x, made, mask, bias, scale=scale) for x in (first, second))
        refused.clear()
        for x, y in ((first, bound), (second, again)):
            assert torch.equal(y, mk.masked_linear(x, made, fresh(mask), bias, scale=scale))


def test_compact_again(mask: mk.PackedMask, backend: str, refused: list[str]) -> None:
    kept, (first, second) = torch.randn(mask.count()), torch.randn(2, 3, K)
    with mk.use_backend(backend):
        compact_linear(first, kept, mask)
        refused.append("compact_linear")
        again = compact_linear(second, kept, mask)
        refused.clear()
        assert torch.equal(again, compact_linear(second, kept, fresh(mask)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_conv2d_again(
    channels_last: bool, conv_mask: mk.PackedMask, backend: str, refused: list[str]
) -> None:
    prototype = mk.Prototype(torch.randn(18))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    first, second = (torch.randn(2, 2, 9, 9).contiguous(memory_format=layout) for _ in range(2))
    with mk.use_backend(backend):
        mk.masked_conv2d(first, prototype, conv_mask, stride=2, padding=1)
        refused.append("masked_conv2d")
        again = mk.masked_conv2d(second, prototype, conv_mask, stride=2, padding=1)
        refused.clear()
        expected = mk.masked_conv2d(second, prototype, fresh(conv_mask), stride=2, padding=1)
        assert torch.equal(again, expected)
        assert again.stride() == expected.stride()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that fail if they are called on the ordinary way."""
    names: list[str] = []

    def guard(name: str) -> Callable[..., Tensor]:
        op = getattr(_ops, name)

        def call(*args: Any) -> Tensor:
            assert name not in names
            result: Tensor = op(*args)
            return result

        return call

    for name in ("masked_linear", "compact_linear", "masked_conv2d"):
        monkeypatch.setattr(_ops, name, guard(name))
    return names


X = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
PROTOTYPE = mk.Prototype(torch.randn(K, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.randn(5, K)},
        {"x": torch.randn(K, 3).t()},
        {"x": torch.randn(6, K)[::2]},
        {"x": X[0]},
        {"x": X[None]},
        {"weight": mk.Prototype(torch.randn(K))},
        {"weight": mk.Prototype(torch.randn(K // 2))},
        {"weight": torch.randn(N, K)},
        {"bias": torch.randn(N)},
        {"scale": 2.0},
        {"scale": torch.tensor(-1.0)},
        {"backend": "reference"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_arguments_are_seen(other: dict[str, Any], mask: mk.PackedMask) -> None:
    usual: dict[str, Any] = {"x": X, "weight": PROTOTYPE}
    for _ in range(3):  # remembered, bound, run
        mk.masked_linear(**usual, mask=mask)
    y = mk.masked_linear(**{**usual, **other}, mask=mask)
    assert torch.equal(y, mk.masked_linear(**{**usual, **other}, mask=fresh(mask)))
    assert torch.equal(
        mk.masked_linear(**usual, mask=mask), mk.masked_linear(**usual, mask=fresh(mask))
    )


def test_other_geometry_is_seen(conv_mask: mk.PackedMask) -> None:
    x, weight = torch.randn(1, 2, 9, 9), torch.randn(4, 2, 3, 3)
    for geometry in ({}, {"stride": 2}, {"padding": "same"}, {"padding": 1}, {"dilation": (1, 2)}):
        y = mk.masked_conv2d(x, weight, conv_mask, **geometry)  # type: ignore[arg-type]
        expected = mk.masked_conv2d(x, weight, fresh(conv_mask), **geometry)  # type: ignore[arg-type]
        assert torch.equal(y, expected)
    assert torch.equal(mk.masked_conv2d(x[0], weight, conv_mask, dilation=(1, 2)), expected[0])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_numbers_may_change_in_place(kind: str) -> None:
    mask, weight = mk.TopK()(torch.randn(N, K)), WEIGHTS[kind]()
    values = weight.values if isinstance(weight, mk.Prototype) else weight
    for change in (
        lambda: None,
        lambda: values.mul_(-3),
        lambda: mask.words.copy_(mk.TopK()(torch.randn(N, K)).words),
    ):
        change()
        for _ in range(3):  # remembered, bound, run
            y = mk.masked_linear(X, weight, mask)
            assert torch.equal(y, mk.masked_linear(X, weight, fresh(mask)))


@pytest.mark.parametrize("size", [9, 33])  # few pixels, and many
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("period", [18, 25, 4 * 2 * 3 * 3])
def test_numbers_of_a_convolution_may_change_in_place(
    period: int, channels_last: bool, size: int, conv_mask: mk.PackedMask
) -> None:
    prototype, bias, scale = mk.Prototype(torch.randn(period)), torch.randn(4), torch.tensor(0.5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 2, size, size).contiguous(memory_format=layout)
    values = prototype.values
    assert isinstance(values, Tensor)
    seen: list[Tensor] = []
    for change in (
        lambda: None,
        lambda: values.mul_(-3),
        lambda: scale.mul_(2),
        lambda: bias.mul_(2),
        lambda: conv_mask.words.copy_(mk.TopK()(torch.randn(4, 2, 3, 3)).words),
    ):
        change()
        for _ in range(3):  # remembered, bound, run
            y = mk.masked_conv2d(x, prototype, conv_mask, bias, scale=scale)
            other = fresh(conv_mask)
            assert torch.equal(y, mk.masked_conv2d(x, prototype, other, bias, scale=scale))
        assert all(not torch.equal(y, before) for before in seen)
        seen.append(y)


def test_what_autograd_and_autocast_need_is_done(mask: mk.PackedMask) -> None:
    bias = torch.randn(N)

    def bound(x: Tensor, bias: Tensor | None = None) -> Tensor:
        for _ in range(3):  # remembered, bound, run
            mk.masked_linear(x, PROTOTYPE, mask, bias)
        return x

    x = bound(X.clone()).requires_grad_()
    mk.masked_linear(x, PROTOTYPE, mask).sum().backward()
    assert x.grad is not None
    bound(X, bias)
    bias.requires_grad_()
    assert mk.masked_linear(X, PROTOTYPE, mask, bias).requires_grad
    with torch.no_grad():
        assert not mk.masked_linear(X, PROTOTYPE, mask, bias).requires_grad
    bound(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.masked_linear(X, PROTOTYPE, mask).dtype == torch.bfloat16
    expected = mk.masked_linear(X, PROTOTYPE, mask)
    assert expected.dtype == torch.float32
    bound(X[0])
    batched = torch.func.vmap(
        lambda row: mk.masked_linear(row, PROTOTYPE, mask), randomness="error"
    )
    torch.testing.assert_close(batched(X), expected)
    bound(X)
    with pytest.raises(RuntimeError, match="setup_context"):  # refused, not taken for a constant
        torch.func.grad(lambda x: mk.masked_linear(x, PROTOTYPE, mask).sum())(X)


def test_ops_are_told_apart(mask: mk.PackedMask) -> None:
    values = torch.randn(mask.count())
    for _ in range(2):
        for _ in range(3):
            as_prototype = mk.masked_linear(X, values, mask)
        for _ in range(3):
            as_kept = compact_linear(X, values, mask)
        assert torch.equal(as_prototype, mk.masked_linear(X, values, fresh(mask)))
        assert torch.equal(as_kept, compact_linear(X, values, fresh(mask)))


def test_a_backend_asked_for_later_is_obeyed(mask: mk.PackedMask) -> None:
    mk.masked_linear(X, PROTOTYPE, mask)
    with pytest.raises(mk.BackendError, match="'cuda'"):
        mk.masked_linear(X, PROTOTYPE, mask, backend="cuda")


def test_errors_are_those_of_a_first_call(mask: mk.PackedMask) -> None:
    mk.masked_linear(X, PROTOTYPE, mask)
    with pytest.raises(TypeError, match=r"weight: got dtype .*float32, expected .*float64"):
        mk.masked_linear(X.double(), PROTOTYPE, mask)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 63\)"):
        mk.masked_linear(X[:, 1:], PROTOTYPE, mask)
    with pytest.raises(TypeError, match="bias: got list, expected Tensor"):
        mk.masked_linear(X, PROTOTYPE, mask, [1.0])  # type: ignore[arg-type]


def test_masks_are_copied_without_what_they_remember(mask: mk.PackedMask) -> None:
    expected = mk.masked_linear(X, PROTOTYPE, mask)
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert torch.equal(mk.masked_linear(X, PROTOTYPE, twin), expected)


def test_layers_follow_their_buffers() -> None:
    model, twin = (torch.nn.Sequential(torch.nn.Linear(K, N)) for _ in range(2))
    for seed, net in enumerate((model, twin)):
        mk.mask_model_(net, mk.recipes.random_padding(1.0), seed=seed)
        mk.pack_model_(net)
    for _ in range(2):
        assert not torch.equal(model(X), twin(X))
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(X), twin(X))
    model.double()
    torch.testing.assert_close(model(X.double()).float(), twin(X))
    assert copy.deepcopy(model)(X.double()).equal(model(X.double()))
