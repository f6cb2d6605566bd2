"""gelu_batch_norm, batch_norm_relu and FusedSequential against the functions of torch that they are
made of.
"""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import assert_within
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import why_not

# Two values per channel cancel in the gradient of x; the error of a single channel is luck.
SIZES = ((2, 17, 2, 3), (3, 16, 5, 5), (2, 33, 7, 6), (4, 64, 8, 8), (1, 5, 30, 21))
EPS = 1e-5
STATS = {"gelu_batch_norm": "gelu_stats", "batch_norm_relu": "batch_norm_stats"}


def plain(name: str, x: Tensor, *args: object, residual: Tensor | float = 0.0) -> Tensor:
    """The function ``name`` of this package, by those of torch."""
    if name == "gelu_batch_norm":
        return F.batch_norm(F.gelu(x), *args) + residual
    return F.relu(F.batch_norm(x, *args) + residual)


def grad_of(x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(1)
    grad = torch.randn(x.shape, generator=generator, device=x.device)
    return grad.contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=STATS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def function(name: str) -> Callable[..., Tensor]:
    return getattr(mk, name)


@pytest.fixture
def backend(name: str, backend: str) -> str:
    if reason := why_not(backend, name):
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm(
    size: tuple[int, ...],
    memory_format: torch.memory_format,
    training: bool,
    adds: bool,
    name: str,
    backend: str,
) -> None:
    check(name, size, memory_format, training, adds, torch.float32, torch.float32, backend)


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_vectors", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(
    dtype: torch.dtype,
    of_vectors: torch.dtype | None,
    training: bool,
    adds: bool,
    name: str,
    backend: str,
) -> None:
    """With weight, bias and statistics of the same dtype, and in float32 as under autocast."""
    if reason := why_not(backend, name, torch.ones(1, 1, 1, 1, dtype=dtype)):
        pytest.skip(reason)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        vectors = of_vectors or dtype
        check(name, (3, 17, 7, 6), memory_format, training, adds, dtype, vectors, backend)


def check(
    name: str,
    size: tuple[int, ...],
    memory_format: torch.memory_format,
    training: bool,
    adds: bool,
    dtype: torch.dtype,
    of_vectors: torch.dtype,
    backend: str,
) -> None:
    channels = size[1]
    x = (2 * torch.randn(size)).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(2, channels).to(of_vectors).unbind()
    stats = torch.stack([torch.randn(channels), torch.rand(channels) + 0.5]).to(of_vectors)
    leaves = [x, weight, bias, *([torch.randn_like(x)] if adds else [])]

    def run(dtype: torch.dtype | None, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """y, the running statistics afterwards, and the gradients of the leaves; in the dtype, or
        in those of the tensors.
        """
        x, *vectors = of = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        mean, var = stats.to(dtype).clone()
        added = {"residual": vectors.pop()} if adds else {}
        y = function(x, mean, var, *vectors, training, 0.3, EPS, **added)
        return y.detach(), mean, var, *torch.autograd.grad(y, of, grad_of(x).to(y))

    got = run(None, functools.partial(getattr(mk, name), backend=backend))
    expected, truth = (run(each, functools.partial(plain, name)) for each in (None, torch.float64))
    grads = ("grad x", "grad weight", "grad bias", "grad residual")
    for what, *tensors in zip(("y", "mean", "var", *grads), got, expected, truth, strict=False):
        assert_within(what, *tensors)
    assert len(got) == len(truth)
    if min(size) > 1:
        assert got[0].is_contiguous(memory_format=memory_format)


def test_without_affine_or_running_statistics(name: str, backend: str) -> None:
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    y = getattr(mk, name)(x, None, None, training=True, backend=backend)
    expected = plain(name, x, None, None, None, None, True)
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(t, x, grad_of(x))[0] for t in (y, expected))
    torch.testing.assert_close(*grads)


def test_statistics_of_values_far_from_zero(name: str, backend: str) -> None:
    """The variance does not drown in the square of the mean."""
    x = 1000 + torch.randn(8, 4, 16, 16)
    y = getattr(mk, name)(x, None, None, training=True, backend=backend)
    truth, expected = (
        plain(name, x.to(dtype), None, None, None, None, True)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within("y", y, expected, truth)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_other_image(memory_format: torch.memory_format, name: str, backend: str) -> None:
    """Pixels follow one another within an image, but not from one image to the next."""
    x = torch.randn(6, 17, 5, 4).contiguous(memory_format=memory_format)[::2]
    stats = getattr(_ops, STATS[name])
    expected, truth = (stats(t, "reference") for t in (x, x.double()))
    assert_within("stats", stats(x, backend), expected, truth)
    y = getattr(mk, name)(x, None, None, training=True, residual=x, backend=backend)
    torch.testing.assert_close(y, plain(name, x, None, None, None, None, True, residual=x))


def test_infinity_and_nan_stay(name: str, backend: str) -> None:
    # PyTorch's own GELU, which is the reference's, gives nan for inf with AVX-512 in float32.
    dtype = torch.float64 if backend == "reference" else torch.float32
    x = torch.tensor([torch.inf, torch.nan], dtype=dtype).view(1, 2, 1, 1)
    y = getattr(mk, name)(x, x.new_zeros(2), x.new_ones(2), backend=backend)
    torch.testing.assert_close(y, x, equal_nan=True)


@pytest.mark.parametrize("name", ["batch_norm_relu"])
def test_no_gradient_passes_relu_at_zero(name: str, backend: str) -> None:
    """With a residual and without, as in PyTorch."""
    x = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).requires_grad_()
    for residual in (None, torch.zeros_like(x)):
        y = mk.batch_norm_relu(
            x, torch.zeros(3), torch.ones(3), eps=0.0, residual=residual, backend=backend
        )
        assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, adds: bool, function: Callable[..., Tensor]) -> None:
    leaves = [torch.randn(2, 3, 3, 2).double(), *torch.randn(2, 3).double()]
    leaves += [torch.randn(2, 3, 3, 2).double()] if adds else []
    stats = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, var = (t.clone() for t in stats)
        return function(x, mean, var, weight, bias, training, residual=residual)

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x, s: f(x[0], s, s), ValueError, "x: got shape"),
        (lambda f, x, s: f(x, s[:2], s), ValueError, "running_mean: got"),
        (lambda f, x, s: f(x, s, s.double()), TypeError, "running_var: got"),
        (lambda f, x, s: f(x, s, s, 1.0), TypeError, "weight: got float"),
        (lambda f, x, s: f(x, s, s, residual=s), ValueError, "residual: got"),
        (lambda f, x, s: f(x, None, None), ValueError, "running_mean, run"),
        (
            lambda f, x, s: f(x[:1, :, :1, :1], s, s, training=True),
            ValueError,
            "expected 2 values per channel",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message, function: Callable[..., Tensor]) -> None:
    with pytest.raises(error, match=message):
        call(function, torch.randn(2, 3, 4, 4), torch.ones(3))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["before", "after"])
def test_fused_sequential_is_sequential(
    activation: str, affine: bool, track: bool, momentum: float | None
) -> None:
    """Same outputs, gradients and buffers over three steps and in evaluation."""
    norm = nn.BatchNorm2d(6, affine=affine, track_running_stats=track, momentum=momentum)
    around = [nn.GELU(), norm] if activation == "before" else [norm, nn.ReLU(inplace=True)]
    layers = [nn.Conv2d(4, 6, 3), *around, nn.Sigmoid()]
    plain_model = nn.Sequential(*copy.deepcopy(layers))
    fused = mk.nn.FusedSequential(*layers)
    assert list(fused.state_dict()) == list(plain_model.state_dict())
    for step in range(4):
        x = torch.randn(3, 4, 8, 8).contiguous(memory_format=torch.channels_last)
        for model in (plain_model, fused):
            model.train(step < 3).zero_grad()
            model(x).square().sum().backward()
        torch.testing.assert_close(fused(x), plain_model(x))
        for ours, theirs in zip(fused.parameters(), plain_model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.state_dict(), plain_model.state_dict())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), None], ids=str)
def test_the_residual_is_added_last(activation: nn.Module | None) -> None:
    """And what it makes is activated."""
    x = torch.randn(3, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    for last in ([nn.BatchNorm2d(6)], [nn.BatchNorm2d(6), nn.ReLU()], []):
        layers = [nn.GELU(), *last]
        for residual in (x, x.double(), None):
            got = mk.nn.FusedSequential(*layers)(x, residual, activation)
            expected = nn.Sequential(*layers)(x)
            if residual is not None:
                expected = expected + residual
            if activation is not None:
                expected = activation(expected)
            torch.testing.assert_close(got.float(), expected.float())
            assert got.dtype == expected.dtype


def test_hooks_of_the_layers_run() -> None:
    x = torch.randn(3, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    for index in range(4):
        layers, seen = [nn.GELU(), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU()], []
        layers[index].register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        mk.nn.FusedSequential(*layers[:3])(x, x, layers[3])
        assert [tuple(y.shape) for y in seen] == [x.shape]


def test_results_hold_their_storage_alone(name: str, backend: str) -> None:
    """Not as views of another tensor; else autograd cannot add gradients in place."""
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    words = mk.PackedMask.from_bool(torch.ones(8, 8, dtype=torch.bool)).words
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
    ops = torch.ops.masked_kernels
    for result in (
        getattr(ops, name)(x, torch.ones(2, 8), None, None, None, EPS, backend),
        ops.masked_conv2d(x, torch.ones(8), words, None, None, *geometry, backend),
    ):
        assert result._base is None


def test_fused_sequential_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in STATS:
        op = getattr(_ops, name)
        monkeypatch.setattr(
            _ops, name, lambda *args, name=name, op=op: calls.append(name) or op(*args)
        )
    has_cpu = mk.backends()["cpu"] is None
    gelu, relu = (([name] if has_cpu else []) for name in STATS)
    image = torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    cases = {
        (nn.GELU(), nn.BatchNorm2d(5)): (image, gelu),
        (nn.GELU("tanh"), nn.BatchNorm2d(5)): (image, []),
        (nn.ReLU(), nn.BatchNorm2d(5)): (image, []),
        (nn.GELU(), nn.SyncBatchNorm(5).eval()): (image, []),
        (nn.GELU(), nn.BatchNorm2d(5), nn.GELU()): (image.contiguous(), []),
        (nn.GELU(), nn.BatchNorm2d(5).double()): (image.double(), []),
        (nn.BatchNorm2d(5), nn.ReLU()): (image, relu),
        (nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.ReLU()): (image, relu),
        (nn.GELU(), nn.BatchNorm2d(5), nn.ReLU()): (image, gelu),
        (nn.BatchNorm2d(5), nn.GELU(), nn.ReLU()): (image, []),
    }
    for layers, (x, fused) in cases.items():
        calls.clear()
        torch.testing.assert_close(mk.nn.FusedSequential(*layers)(x), nn.Sequential(*layers)(x))
        assert calls == fused, layers
    calls.clear()
    model, activation = mk.nn.FusedSequential(nn.GELU(), nn.BatchNorm2d(5)), nn.ReLU()
    norm = nn.BatchNorm2d(5)
    mk.nn.FusedSequential(norm)(image, image, activation)
    assert calls == relu
    model.fuse = False
    model(image, image, activation)
    assert calls == relu
