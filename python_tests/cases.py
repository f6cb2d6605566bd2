"""Shapes, masks and weights that every op is tested on, and the error bound it must keep."""

from dataclasses import dataclass

import torch
from torch import Tensor

import masked_kernels as mk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("random", "none", "all", "one")
PERIODS = ("dense", "1", "7", "K", "K+3", "2K", "NK+5")


@dataclass(frozen=True)
class Linear:
    """x [m, k] times weight [n, k]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


LINEAR = (
    *(Linear(0, 3, 5), Linear(2, 0, 5), Linear(2, 3, 0)),
    Linear(1, 1, 1),
    *(Linear(3, 5, k) for k in (31, 32, 33, 63, 64, 65)),
    Linear(7, 37, 129),
    Linear(1, 70, 257),
    Linear(8, 64, 128),
    Linear(40, 33, 100),
)


@dataclass(frozen=True)
class Conv:
    """x [batch, channels, *size] under weight [outputs, channels / groups, *kernel]."""

    batch: int = 2
    channels: int = 4
    size: tuple[int, int] = (7, 6)
    outputs: int = 6
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int = 1
    groups: int = 1

    def __str__(self) -> str:
        fields = (self.batch, self.channels, *self.size, self.outputs, *self.kernel)
        text = f"{'x'.join(map(str, fields))}-s{self.stride}-p{self.padding}"
        text += f"-d{self.dilation}-g{self.groups}"
        return text.replace(" ", "")

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.outputs, self.channels // self.groups, *self.kernel)

    @property
    def geometry(self) -> dict[str, object]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


CONV = (
    Conv(batch=0),
    Conv(batch=1, channels=1, size=(1, 1), outputs=1, kernel=(1, 1)),
    Conv(channels=33, outputs=31, kernel=(1, 1)),
    Conv(channels=64, outputs=65, kernel=(1, 1), batch=1),
    Conv(channels=5, outputs=3, kernel=(1, 1), stride=2),
    Conv(padding="same"),
    Conv(kernel=(2, 4), padding="same", dilation=2, size=(9, 11)),
    Conv(stride=(2, 1), padding=(1, 2), kernel=(3, 5)),
    Conv(groups=2, padding=1),
    Conv(channels=6, outputs=6, groups=6, kernel=(5, 5), padding="same"),
    Conv(channels=17, outputs=17, groups=17, kernel=(3, 3), padding=(0, 2)),
    Conv(channels=20, outputs=20, groups=20, kernel=(7, 7), padding="same", size=(5, 9)),
    Conv(channels=3, outputs=3, groups=3, kernel=(9, 9), padding="same", batch=3),
    Conv(channels=3, outputs=6, groups=3, kernel=(3, 3), padding=1),
)


def make_mask(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "random":
        return torch.rand(shape) < 0.5
    if kind == "one":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[-1:] = True
        return mask
    return torch.full(shape, kind == "all")


def make_weight(period: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | mk.Prototype:
    """A dense weight or a Prototype of the period named, K being the row length and NK the number
    of weights.
    """
    n, k = shape[0], torch.Size(shape[1:]).numel()
    if period == "dense":
        return torch.randn(shape, dtype=dtype)
    length = {"1": 1, "7": 7, "K": k, "K+3": k + 3, "2K": 2 * k, "NK+5": n * k + 5}[period]
    return mk.Prototype(torch.randn(max(length, 1), dtype=dtype))


def dense(weight: Tensor | mk.Prototype, shape: tuple[int, ...]) -> Tensor:
    """The weight written out, by repetition rather than by the package's index arithmetic."""
    if isinstance(weight, Tensor):
        return weight
    size = torch.Size(shape).numel()
    return weight.values.repeat(size // weight.period + 1)[:size].reshape(shape)


def assert_within(
    name: str, got: Tensor, plain: Tensor, truth: Tensor, computed_in: torch.dtype | None = None
) -> None:
    """The error of ``got`` against float64 is at most twice that of plain PyTorch in the same
    dtype, plus one rounding.

    The rounding is that of ``computed_in``, for a float32 score gradient that both form from a
    16-bit weight gradient.
    """
    assert got.shape == truth.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    error = (got.double() - truth).norm()
    eps = torch.finfo(computed_in or got.dtype).eps
    bound = 2 * (plain.double() - truth).norm() + eps * truth.norm()
    assert error <= bound, f"{name}: error {error:.3e} over the bound {bound:.3e}"
