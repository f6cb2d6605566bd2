"""gelu_batch_norm and FusedSequential against BatchNorm2d(GELU(x)) of torch."""

import copy
from collections.abc import Sequence

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


def plain(
    leaves: Sequence[Tensor], stats: Tensor, training: bool, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """y, the running statistics afterwards, and the gradients of x, weight, bias and residual;
    computed in a dtype or in those of the tensors.
    """
    x, weight, bias, residual = leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    mean, var = stats.to(dtype).clone()
    y = F.batch_norm(F.gelu(x), mean, var, weight, bias, training, 0.3, EPS) + residual
    return y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad_of(x).to(dtype))


def grad_of(x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(1)
    grad = torch.randn(x.shape, generator=generator, device=x.device)
    return grad.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def backend(backend: str) -> str:
    if reason := why_not(backend, "gelu_batch_norm"):
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gelu_batch_norm(
    size: tuple[int, ...], memory_format: torch.memory_format, training: bool, backend: str
) -> None:
    check(size, memory_format, training, torch.float32, torch.float32, backend)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_vectors", [torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(
    dtype: torch.dtype, of_vectors: torch.dtype | None, training: bool, backend: str
) -> None:
    """With weight, bias and statistics of the same dtype, and in float32 as under autocast."""
    if reason := why_not(backend, "gelu_stats", torch.ones(1, 1, 1, 1, dtype=dtype)):
        pytest.skip(reason)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check((3, 17, 7, 6), memory_format, training, dtype, of_vectors or dtype, backend)


def check(
    size: tuple[int, ...],
    memory_format: torch.memory_format,
    training: bool,
    dtype: torch.dtype,
    of_vectors: torch.dtype,
    backend: str,
) -> None:
    channels = size[1]
    x = (2 * torch.randn(size)).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(2, channels).to(of_vectors).unbind()
    stats = torch.stack([torch.randn(channels), torch.rand(channels) + 0.5]).to(of_vectors)
    residual = torch.randn_like(x)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    mean, var = stats.clone()
    y = mk.gelu_batch_norm(
        x, mean, var, weight, bias, training, 0.3, EPS, residual=residual, backend=backend
    )
    got = (y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad_of(x)))
    expected, truth = (plain(leaves, stats, training, each) for each in (None, torch.float64))
    grads = ("grad x", "grad weight", "grad bias", "grad residual")
    names = ("y", "running mean", "running var", *grads)
    for name, *tensors in zip(names, got, expected, truth, strict=True):
        assert_within(name, *tensors)
    if min(size) > 1:
        assert y.is_contiguous(memory_format=memory_format)


def test_without_affine_or_running_statistics(backend: str) -> None:
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    y = mk.gelu_batch_norm(x, None, None, training=True, backend=backend)
    expected = F.batch_norm(F.gelu(x), None, None, training=True)
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(t, x, grad_of(x))[0] for t in (y, expected))
    torch.testing.assert_close(*grads)


def test_statistics_of_values_far_from_zero(backend: str) -> None:
    """The variance does not drown in the square of the mean."""
    x = 1000 + torch.randn(8, 4, 16, 16)
    y = mk.gelu_batch_norm(x, None, None, training=True, backend=backend)
    truth, expected = (
        F.batch_norm(F.gelu(x.to(dtype)), None, None, training=True)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within("y", y, expected, truth)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_other_image(memory_format: torch.memory_format, backend: str) -> None:
    """Pixels follow one another within an image, but not from one image to the next."""
    x = torch.randn(6, 17, 5, 4).contiguous(memory_format=memory_format)[::2]
    plain, truth = (_ops.gelu_stats(t, "reference") for t in (x, x.double()))
    assert_within("stats", _ops.gelu_stats(x, backend), plain, truth)
    y = mk.gelu_batch_norm(x, None, None, training=True, residual=x, backend=backend)
    expected = F.batch_norm(F.gelu(x), None, None, training=True) + x
    torch.testing.assert_close(y, expected)


def test_infinity_and_nan_stay(backend: str) -> None:
    # PyTorch's own GELU, which is the reference's, gives nan for inf with AVX-512 in float32.
    dtype = torch.float64 if backend == "reference" else torch.float32
    x = torch.tensor([torch.inf, torch.nan], dtype=dtype).view(1, 2, 1, 1)
    y = mk.gelu_batch_norm(x, x.new_zeros(2), x.new_ones(2), backend=backend)
    torch.testing.assert_close(y, x, equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool) -> None:
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    residual = torch.randn_like(x, requires_grad=True)
    stats = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def run(*leaves: Tensor) -> Tensor:
        mean, var = (t.clone() for t in stats)
        return mk.gelu_batch_norm(leaves[0], mean, var, *leaves[1:3], training, residual=leaves[3])

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, s: mk.gelu_batch_norm(x[0], s, s), ValueError, "x: got shape"),
        (lambda x, s: mk.gelu_batch_norm(x, s[:2], s), ValueError, "running_mean: got"),
        (lambda x, s: mk.gelu_batch_norm(x, s, s.double()), TypeError, "running_var: got"),
        (lambda x, s: mk.gelu_batch_norm(x, s, s, 1.0), TypeError, "weight: got float"),
        (lambda x, s: mk.gelu_batch_norm(x, s, s, residual=s), ValueError, "residual: got"),
        (lambda x, s: mk.gelu_batch_norm(x, None, None), ValueError, "running_mean, run"),
        (
            lambda x, s: mk.gelu_batch_norm(x[:1, :, :1, :1], s, s, training=True),
            ValueError,
            "expected 2 values per channel",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4, 4), torch.ones(3))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_fused_sequential_is_sequential(affine: bool, track: bool, momentum: float | None) -> None:
    """Same outputs, gradients and buffers over three steps and in evaluation."""
    norm = nn.BatchNorm2d(6, affine=affine, track_running_stats=track, momentum=momentum)
    layers = [nn.Conv2d(4, 6, 3), nn.GELU(), norm, nn.ReLU()]
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


def test_the_residual_is_added_last() -> None:
    x = torch.randn(3, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    for last in ([nn.BatchNorm2d(6)], [nn.BatchNorm2d(6), nn.ReLU()], []):
        layers = [nn.GELU(), *last]
        for residual in (x, x.double()):
            got = mk.nn.FusedSequential(*layers)(x, residual=residual)
            assert got.dtype == residual.dtype
            expected = nn.Sequential(*layers)(x) + residual
            torch.testing.assert_close(got.float(), expected.float())


def test_hooks_of_the_layers_run() -> None:
    x = torch.randn(3, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    for index in range(2):
        model, seen = mk.nn.FusedSequential(nn.GELU(), nn.BatchNorm2d(6)), []
        model[index].register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        model(x)
        assert [tuple(y.shape) for y in seen] == [x.shape]


def test_results_hold_their_storage_alone(backend: str) -> None:
    """Not as views of another tensor; else autograd cannot add gradients in place."""
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    words = mk.PackedMask.from_bool(torch.ones(8, 8, dtype=torch.bool)).words
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
    ops = torch.ops.masked_kernels
    for result in (
        ops.gelu_batch_norm(x, torch.ones(2, 8), None, None, None, EPS, backend),
        ops.masked_conv2d(x, torch.ones(8), words, None, None, *geometry, backend),
    ):
        assert result._base is None


def test_fused_sequential_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = mk.gelu_batch_norm
    monkeypatch.setattr(
        "masked_kernels.nn.sequential.gelu_batch_norm",
        lambda *args, **kw: calls.append(1) or run(*args, **kw),
    )
    image = torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    cases = {
        (nn.GELU(), nn.BatchNorm2d(5)): (image, mk.backends()["cpu"] is None),
        (nn.GELU("tanh"), nn.BatchNorm2d(5)): (image, False),
        (nn.ReLU(), nn.BatchNorm2d(5)): (image, False),
        (nn.GELU(), nn.SyncBatchNorm(5).eval()): (image, False),
        (nn.GELU(), nn.BatchNorm2d(5), nn.GELU()): (image.contiguous(), False),
        (nn.GELU(), nn.BatchNorm2d(5).double()): (image.double(), False),
    }
    for layers, (x, fuses) in cases.items():
        calls.clear()
        torch.testing.assert_close(mk.nn.FusedSequential(*layers)(x), nn.Sequential(*layers)(x))
        assert bool(calls) == fuses, layers
    calls.clear()
    model = mk.nn.FusedSequential(nn.GELU(), nn.BatchNorm2d(5))
    model.fuse = False
    model(image)
    assert not calls
