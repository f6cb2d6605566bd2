"""What ``bench.gpu_report`` measures: problems in bfloat16, ours beside what users run.

Every provider is called with the number of a copy of its operands, so that no operand is found in a
cache by the next call.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_kernels as mk
from masked_kernels import _ops
from masked_kernels.backends import forget_thresholds

from .providers import int4_product, sort_and_scatter, topk_and_scatter

COPIES = 2
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Problem:
    """Args:
    providers: by name, the same function of a copy's number.
    error: of a provider's result for copy 0, in units of the error of plain PyTorch.
    baseline: the provider that plain PyTorch users would take.
    lossy: providers that compute in fewer bits, whose error is not held against them.
    """

    providers: dict[str, Callable[[int], Tensor]]
    error: Callable[[Tensor], float]
    baseline: str
    lossy: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Linear:
    """``x [tokens, cols]`` times a masked ``[rows, cols]``; the period is that of a ratio of 1e-2,
    aligned or the paper's, or the weight is dense.
    """

    rows: int
    cols: int
    tokens: int
    values: str  # aligned, any period, dense

    @property
    def name(self) -> str:
        return f"masked_linear {self.rows}x{self.cols} {self.values} tokens={self.tokens}"

    def build(self, device: str, backend: str) -> Problem:
        shape = torch.Size((self.rows, self.cols))
        if self.values == "dense":
            weights = [torch.randn(shape, device=device).to(DTYPE) for _ in range(COPIES)]
            values: list[Any] = weights
        else:
            align = [self.cols] if self.values == "aligned" else None
            period = mk.prototype_period(shape.numel(), 1e-2, align)
            if align and self.cols % period:
                period = self.cols
            drawn = (torch.randn(period, device=device).to(DTYPE) for _ in range(COPIES))
            values = [mk.Prototype(v) for v in drawn]
            weights = [v.fill(shape) for v in values]
        bits = [torch.rand(shape, device=device) < 0.5 for _ in range(COPIES)]
        masks = [mk.PackedMask.from_bool(b) for b in bits]
        masked = [torch.where(b, w, 0) for b, w in zip(bits, weights, strict=True)]
        x = [torch.randn(self.tokens, self.cols, device=device).to(DTYPE) for _ in range(COPIES)]
        truth = F.linear(x[0].double(), masked[0].double())
        plain = F.linear(x[0], masked[0])
        providers: dict[str, Callable[[int], Tensor]] = {
            "ours": lambda i: mk.masked_linear(x[i], values[i], masks[i], backend=backend),
            "F.linear": lambda i: F.linear(x[i], masked[i]),
            "F.linear(x, w * m)": lambda i: F.linear(x[i], weights[i] * bits[i]),
        }
        if device == "cuda" and self.tokens <= 64:
            with contextlib.suppress(RuntimeError):  # where this build of torch has none
                products = [int4_product(weight) for weight in masked]
                products[0](x[0])
                providers["int4, lossy"] = lambda i: products[i](x[i])
        return Problem(
            providers,
            lambda y: error_ratio(y, plain, truth),
            baseline="F.linear",
            lossy=frozenset(["int4, lossy"]),
        )


@dataclass(frozen=True)
class Compact:
    """``x [tokens, cols]`` times the half of a dense weight that a mask keeps."""

    rows: int
    cols: int
    tokens: int

    @property
    def name(self) -> str:
        return f"compact_linear {self.rows}x{self.cols} tokens={self.tokens}"

    def build(self, device: str, backend: str) -> Problem:
        masks = [torch.rand(self.rows, self.cols, device=device) < 0.5 for _ in range(COPIES)]
        drawn = [torch.randn(self.rows, self.cols, device=device).to(DTYPE) for _ in range(COPIES)]
        masked = [torch.where(m, w, 0) for m, w in zip(masks, drawn, strict=True)]
        kept = [w[m] for m, w in zip(masks, drawn, strict=True)]
        packed = [mk.PackedMask.from_bool(m) for m in masks]
        x = [torch.randn(self.tokens, self.cols, device=device).to(DTYPE) for _ in range(COPIES)]
        truth, plain = F.linear(x[0].double(), masked[0].double()), F.linear(x[0], masked[0])
        return Problem(
            {
                "ours": lambda i: mk.functional.compact_linear(
                    x[i], kept[i], packed[i], backend=backend
                ),
                "F.linear": lambda i: F.linear(x[i], masked[i]),
            },
            lambda y: error_ratio(y, plain, truth),
            baseline="F.linear",
        )


@dataclass(frozen=True)
class GradScores:
    """The score gradient of a linear layer with a prototype."""

    rows: int
    cols: int
    tokens: int

    @property
    def name(self) -> str:
        return f"scored_linear_grad_scores {self.rows}x{self.cols} tokens={self.tokens}"

    def build(self, device: str, backend: str) -> Problem:
        shape = torch.Size((self.rows, self.cols))
        prototype = mk.Prototype(torch.randn(shape.numel() // 100 + 1, device=device).to(DTYPE))
        weight = prototype.fill(shape)
        scores = [torch.randn(shape, device=device) for _ in range(COPIES)]
        x = [torch.randn(self.tokens, self.cols, device=device).to(DTYPE) for _ in range(COPIES)]
        grad = [torch.randn(self.tokens, self.rows, device=device).to(DTYPE) for _ in range(COPIES)]

        def ours(i: int) -> Tensor:
            result: Tensor = _ops.scored_linear_grad_scores(
                grad[i], x[i], prototype.values, scores[i], None, True, backend
            )
            return result

        def plain(i: int) -> Tensor:
            return (grad[i].t() @ x[i]) * weight * scores[i].sign()

        truth = (grad[0].double().t() @ x[0].double()) * weight.double() * scores[0].sign()
        expected = plain(0)
        return Problem(
            {"ours": ours, "matmul and multiply": plain},
            lambda y: error_ratio(y, expected, truth),
            baseline="matmul and multiply",
        )


def _cold(select: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """A top-k that does not know the last threshold; that it is made to forget is timed too."""

    def cold(i: int) -> Tensor:
        forget_thresholds()
        return select(i)

    return cold


@dataclass(frozen=True)
class SelectTopK:
    """float32 scores to the mask of the larger half by magnitude."""

    numel: int

    @property
    def name(self) -> str:
        return f"select_topk n={self.numel:,}"

    def build(self, device: str, backend: str) -> Problem:
        scores = [torch.randn(1, self.numel, device=device) for _ in range(COPIES)]
        rule, keep = mk.TopK(0.5), self.numel - self.numel // 2

        def ours(i: int) -> Tensor:
            return rule.select(scores[i], backend)

        return Problem(
            {
                "ours": _cold(ours),
                "ours, scores unchanged": ours,
                "torch.topk": lambda i: topk_and_scatter(scores[i], keep),
                "sort and scatter": lambda i: sort_and_scatter(scores[i].abs(), keep),
            },
            lambda mask: selection_error(mask, scores[0], keep),
            baseline="torch.topk",
        )


@dataclass(frozen=True)
class SelectTopKMany:
    """All layers of a model at once, the larger half of each; the last one's mask is the result."""

    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"select_topk_many n={sum(self.layers):,} layers={len(self.layers)}"

    def build(self, device: str, backend: str) -> Problem:
        scores = [[torch.randn(1, n, device=device) for n in self.layers] for _ in range(COPIES)]
        rule, keep = mk.TopK(0.5), [n - n // 2 for n in self.layers]

        def ours(i: int) -> Tensor:
            return rule.select_many(scores[i], backend)[-1]

        return Problem(
            {
                "ours": _cold(ours),
                "ours, scores unchanged": ours,
                "torch.topk": lambda i: [*map(topk_and_scatter, scores[i], keep)][-1],
            },
            lambda mask: selection_error(mask, scores[0][-1], keep[-1]),
            baseline="torch.topk",
        )


@dataclass(frozen=True)
class Conv2d:
    """A masked convolution that keeps the size, channels_last, with a prototype."""

    batch: int
    channels: int
    size: int
    kernel: int
    groups: int = 1

    @property
    def name(self) -> str:
        kind = "depthwise " if self.groups == self.channels else ""
        image = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        return f"masked_conv2d {kind}{self.kernel}x{self.kernel} on {image}"

    def build(self, device: str, backend: str) -> Problem:
        shape = torch.Size((self.channels, self.channels // self.groups, self.kernel, self.kernel))
        prototype = mk.Prototype(torch.randn(shape.numel() // 100 + 1, device=device).to(DTYPE))
        bits = torch.rand(shape, device=device) < 0.5
        mask = mk.PackedMask.from_bool(bits)
        last = torch.channels_last
        weight = prototype.fill(shape).contiguous(memory_format=last)
        masked = torch.where(bits, weight, 0).contiguous(memory_format=last)
        size = (self.batch, self.channels, self.size, self.size)
        images = [torch.randn(size, device=device).to(DTYPE) for _ in range(COPIES)]
        x = [image.contiguous(memory_format=last) for image in images]
        options: dict[str, Any] = {"padding": self.kernel // 2, "groups": self.groups}
        plain = F.conv2d(x[0], masked, **options)
        truth = F.conv2d(x[0].double(), masked.double(), **options)
        return Problem(
            {
                "ours": lambda i: mk.masked_conv2d(
                    x[i], prototype, mask, backend=backend, **options
                ),
                "F.conv2d": lambda i: F.conv2d(x[i], masked, **options),
                "F.conv2d(x, w * m)": lambda i: F.conv2d(x[i], weight * bits, **options),
            },
            lambda y: error_ratio(y, plain, truth),
            baseline="F.conv2d",
        )


@dataclass(frozen=True)
class Fused:
    """A masked convolution of packed inference, channels_last, with GELU, norm and residual."""

    batch: int
    channels: int
    size: int
    kernel: int
    groups: int

    @property
    def name(self) -> str:
        kind = "depthwise " if self.groups == self.channels else ""
        image = f"{self.batch}x{self.channels}x{self.size}x{self.size}"
        return f"masked_conv2d_fused {kind}{self.kernel}x{self.kernel} on {image}"

    def build(self, device: str, backend: str) -> Problem:
        shape = torch.Size((self.channels, self.channels // self.groups, self.kernel, self.kernel))
        prototype = mk.Prototype(torch.randn(shape.numel() // 100 + 1, device=device).to(DTYPE))
        bits = torch.rand(shape, device=device) < 0.5
        words = mk.PackedMask.from_bool(bits).words
        last = torch.channels_last
        masked = torch.where(bits, prototype.fill(shape), 0).contiguous(memory_format=last)
        affine = torch.randn(4, self.channels, device=device).to(DTYPE)
        size = (self.batch, self.channels, self.size, self.size)
        drawn = [torch.randn(size, device=device).to(DTYPE) for _ in range(COPIES)]
        x = [image.contiguous(memory_format=last) for image in drawn]
        padding = self.kernel // 2
        geometry = ([self.kernel] * 2, [1, 1], [padding] * 2, [1, 1], self.groups)

        def ours(i: int) -> Tensor:
            result: Tensor = _ops.masked_conv2d_fused(
                x[i], prototype.values, words, affine, "gelu", x[i], *geometry, backend
            )
            return result

        def plain(x: Tensor) -> Tensor:
            rows = affine.to(x.dtype).view(4, -1, 1, 1)
            y = F.conv2d(x, masked.to(x.dtype), padding=padding, groups=self.groups)
            return F.gelu(y * rows[0] + rows[1]) * rows[2] + rows[3] + x

        truth, expected = plain(x[0].double()), plain(x[0])
        return Problem(
            {
                "ours": ours,
                "F.conv2d, GELU, norm, residual": lambda i: plain(x[i]),
                "the same by torch.compile": _compiled(plain, x),
            },
            lambda y: error_ratio(y, expected, truth),
            baseline="F.conv2d, GELU, norm, residual",
        )


def _compiled(plain: Callable[[Tensor], Tensor], x: list[Tensor]) -> Callable[[int], Tensor]:
    """On a GPU; elsewhere the compiler would only cost time."""
    run = torch.compile(plain) if x[0].is_cuda else plain
    return lambda i: run(x[i])


_IN_TORCH = {
    "gelu_batch_norm": "F.batch_norm(F.gelu(x))",
    "batch_norm_relu": "F.relu(F.batch_norm(x))",
}


@dataclass(frozen=True)
class BatchNorm:
    """BatchNorm after GELU, or before ReLU, in training, forward and backward, channels_last, with
    float32 weights.
    """

    function: str
    batch: int
    channels: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.function} on {self.batch}x{self.channels}x{self.size}x{self.size}"

    def build(self, device: str, backend: str) -> Problem:
        size = (self.batch, self.channels, self.size, self.size)
        last = torch.channels_last
        drawn = [torch.randn(2, *size, device=device).to(DTYPE) for _ in range(COPIES)]
        x, grad = ([pair[i].contiguous(memory_format=last) for pair in drawn] for i in range(2))
        weight, bias = torch.randn(2, self.channels, device=device)

        def grad_x(norm: Callable[..., Tensor], x: Tensor, grad: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            y = norm(x, weight.to(x.dtype) if x.dtype == torch.float64 else weight)
            return torch.autograd.grad(y, x, grad)[0]

        def ours(x: Tensor, weight: Tensor) -> Tensor:
            return getattr(mk, self.function)(x, None, None, weight, bias, True, backend=backend)

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            vectors = None, None, weight, bias.to(weight.dtype), True
            if self.function == "gelu_batch_norm":
                return F.batch_norm(F.gelu(x), *vectors)
            return F.relu(F.batch_norm(x, *vectors))

        truth, expected = (
            grad_x(plain, x[0].double(), grad[0].double()),
            grad_x(plain, x[0], grad[0]),
        )
        return Problem(
            {
                "ours": lambda i: grad_x(ours, x[i], grad[i]),
                _IN_TORCH[self.function]: lambda i: grad_x(plain, x[i], grad[i]),
            },
            lambda got: error_ratio(got, expected, truth),
            baseline=_IN_TORCH[self.function],
        )


def selection_error(mask: Tensor, scores: Tensor, keep: int) -> float:
    """0 if ``mask`` keeps the ``keep`` largest by magnitude, ties either way; else infinity."""
    if mask.dtype == torch.int32:
        mask = mk.PackedMask(mask, scores.shape).unpack()
    mask, keys = mask.bool().flatten(), scores.abs().flatten()
    kept, dropped = keys[mask], keys[~mask]
    right = kept.numel() == keep and (
        min(keep, dropped.numel()) == 0 or bool(kept.min() >= dropped.max())
    )
    return 0.0 if right else float("inf")


def error_ratio(got: Tensor, plain: Tensor, truth: Tensor) -> float:
    """Error of ``got`` over that of ``plain``, neither below one rounding of the dtype."""
    rounding = torch.finfo(plain.dtype).eps * truth.norm()
    floor = max(float((plain.double() - truth).norm()), float(rounding))
    return float((got.double() - truth).norm()) / floor


Case = Linear | Compact | GradScores | SelectTopK | SelectTopKMany | Conv2d | Fused | BatchNorm

CASES: tuple[Case, ...] = (
    *(Linear(16384, 16384, tokens, "aligned") for tokens in (1, 16, 64, 1024)),
    *(Linear(4096, 4096, tokens, "aligned") for tokens in (1, 16, 4096)),
    *(Linear(16384, 16384, tokens, "any period") for tokens in (1, 16)),
    *(Linear(8192, 8192, tokens, "dense") for tokens in (1, 64)),
    Compact(8192, 8192, 1),
    GradScores(4096, 4096, 8192),
    SelectTopK(10_000_000),
    SelectTopKMany((256 * 25, 256 * 256) * 8),
    Conv2d(128, 256, 32, 5, groups=256),
    Conv2d(128, 256, 32, 7, groups=256),
    Conv2d(64, 256, 16, 3),
    Conv2d(512, 256, 16, 1),
    Fused(128, 256, 32, 5, groups=256),
    Fused(128, 256, 32, 1, groups=1),
    BatchNorm("gelu_batch_norm", 512, 256, 16),
    BatchNorm("batch_norm_relu", 256, 64, 32),
)

TOY: tuple[Case, ...] = (
    Linear(33, 64, 3, "aligned"),
    Linear(33, 64, 3, "any period"),
    Linear(33, 64, 3, "dense"),
    GradScores(9, 12, 5),
    SelectTopK(1000),
    SelectTopKMany((9, 1000)),
    Conv2d(2, 4, 5, 3, groups=4),
    Compact(9, 33, 3),
    Fused(2, 4, 5, 3, groups=4),
    Fused(2, 4, 5, 1, groups=1),
    BatchNorm("gelu_batch_norm", 2, 4, 5),
    BatchNorm("batch_norm_relu", 2, 4, 5),
)
"""Small enough for the tests."""
