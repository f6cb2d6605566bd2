"""Convolutions of aligned prototypes on the cpu backend: bits times the patches of an image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from masked_kernels import _ops
from masked_kernels.backends import backends

if reason := backends()["cpu"]:
    pytest.skip(f"backend 'cpu' is unavailable: {reason}", allow_module_level=True)

from masked_kernels.backends.cpu import conv2d

GEOMETRIES = {  # kernel, stride, padding, dilation
    "3x3": ([3, 3], [1, 1], [1, 1], [1, 1]),
    "2x3 uneven": ([2, 3], [2, 1], [0, 2], [1, 2]),
    "larger than the image": ([7, 7], [3, 3], [3, 3], [1, 1]),
    "1x1 stride 2": ([1, 1], [2, 2], [0, 0], [1, 1]),
}


@pytest.fixture(autouse=True)
def aligned_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the table of plans says."""
    monkeypatch.setattr(conv2d, "linear_plan", lambda *_: "aligned")
    monkeypatch.setattr(conv2d, "_MANY_CHANNELS", 1)


def check(y: Tensor, truth: Tensor, plain: Tensor) -> None:
    """At most twice the error of plain PyTorch, which is not below rounding the result."""
    rounding = torch.finfo(torch.float32).eps * truth.norm()
    assert (y.double() - truth).norm() <= 2 * max((plain.double() - truth).norm(), rounding)


def problem(channels: int, kernel: list[int], outputs: int, patterns: int) -> tuple[Tensor, ...]:
    """Images of 5 x 6 pixels, a prototype, the weight that it fills, and a mask; patterns 0 is a
    prototype that repeats within a row.
    """
    taps = kernel[0] * kernel[1]
    x = torch.randn(3, channels, 5, 6).to(memory_format=torch.channels_last)
    values = torch.randn(patterns * channels * taps or channels)
    mask = torch.rand(outputs, channels, *kernel) < 0.5
    count = mask.numel()
    weight = values.repeat(-(-count // values.numel()))[:count].view(mask.shape)
    return x, values, weight, mask


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("patterns", [0, 1, 3])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (3, 16), (17, 33), (32, 64)])
def test_equals_the_convolution(channels, outputs, patterns, geometry) -> None:
    kernel, *rest = GEOMETRIES[geometry]
    x, values, weight, mask = problem(channels, kernel, outputs, min(patterns, outputs))
    bias, scale = torch.randn(outputs), torch.tensor(0.5)
    words = _ops.pack(mask.flatten(1), "cpu")
    y = _ops.masked_conv2d(x, values, words, bias, scale, kernel, *rest, 1, "cpu")
    exact = F.conv2d(x.double(), 0.5 * (weight * mask).double(), bias.double(), *rest)
    check(y, exact, F.conv2d(x, 0.5 * (weight * mask), bias, *rest))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("patterns", [0, 1])
def test_fused(patterns) -> None:
    kernel, *rest = GEOMETRIES["3x3"]
    x, values, weight, mask = problem(20, kernel, 20, patterns)
    affine, words = torch.randn(4, 20), _ops.pack(mask.flatten(1), "cpu")
    y = _ops.masked_conv2d_fused(x, values, words, affine, "gelu", x, kernel, *rest, 1, "cpu")

    def plain(x: Tensor, weight: Tensor, affine: Tensor) -> Tensor:
        gain, shift, gain_after, shift_after = affine[:, :, None, None]
        y = F.gelu(F.conv2d(x, weight, None, *rest) * gain + shift)
        return y * gain_after + shift_after + x

    check(
        y,
        plain(x.double(), (weight * mask).double(), affine.double()),
        plain(x, weight * mask, affine),
    )


def test_no_output() -> None:
    x, values, _, mask = problem(4, [3, 3], 5, 1)
    words = _ops.pack(mask.flatten(1), "cpu")
    y = _ops.masked_conv2d(x[:0], values, words, None, None, *GEOMETRIES["3x3"], 1, "cpu")
    assert y.shape == (0, 5, 5, 6)


def test_follows_the_values() -> None:
    """What is kept of a prototype is made anew when its values change."""
    kernel, *rest = GEOMETRIES["3x3"]
    x, values, _, mask = problem(20, kernel, 4, 1)
    words = _ops.pack(mask.flatten(1), "cpu")
    first = _ops.masked_conv2d(x, values, words, None, None, kernel, *rest, 1, "cpu")
    values.mul_(2)
    again = _ops.masked_conv2d(x, values, words, None, None, kernel, *rest, 1, "cpu")
    assert torch.equal(again, 2 * first)
