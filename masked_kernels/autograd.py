"""One autograd.Function per differentiable op; they save tensors and call ops, nothing else.

The score gradient is straight-through: the mask's derivative by the score is taken as 1 everywhere,
so a score gets ``dL/dW_eff * w`` whether its weight is kept or not (edge-popup; PEMN section 3.1),
times sign(score) where the rule ranks |score|.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import _ops


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether to go through autograd, which costs microseconds, or straight to the op."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class MaskedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        values: Tensor,
        words: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, values, words, scale)
        ctx.backend = backend
        y: Tensor = _ops.masked_linear(x, values, words, bias, scale, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        return (*_linear_grads(ctx, grad_y, *ctx.saved_tensors), None, None)


class ScoredLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        values: Tensor,
        words: Tensor,
        bias: Tensor | None,
        scores: Tensor,  # [N, K]
        scale: Tensor | None,
        absolute: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, values, words, scale, scores)
        ctx.absolute, ctx.backend = absolute, backend
        y: Tensor = _ops.masked_linear(x, values, words, bias, scale, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, values, words, scale, scores = ctx.saved_tensors
        grad_scores = None
        if ctx.needs_input_grad[4]:
            grad_scores = _ops.scored_linear_grad_scores(
                grad_y, x, values, scores, scale, ctx.absolute, ctx.backend
            )
        return (*_linear_grads(ctx, grad_y, x, values, words, scale), grad_scores, None, None, None)


class MaskedConv2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, C, H, W]
        values: Tensor,
        words: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        kernel_size: list[int],
        geometry: tuple[list[int], list[int], list[int], int],
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, values, words, scale)
        ctx.kernel_size, ctx.geometry, ctx.backend = kernel_size, geometry, backend
        y: Tensor = _ops.masked_conv2d(
            x, values, words, bias, scale, kernel_size, *geometry, backend
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        return (*_conv2d_grads(ctx, grad_y, *ctx.saved_tensors), None, None, None, None)


class ScoredConv2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, C, H, W]
        values: Tensor,
        words: Tensor,
        bias: Tensor | None,
        scores: Tensor,  # [N, C / groups, kh, kw]
        scale: Tensor | None,
        absolute: bool,
        geometry: tuple[list[int], list[int], list[int], int],
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, values, words, scale, scores)
        ctx.kernel_size, ctx.geometry = list(scores.shape[2:]), geometry
        ctx.absolute, ctx.backend = absolute, backend
        y: Tensor = _ops.masked_conv2d(
            x, values, words, bias, scale, ctx.kernel_size, *geometry, backend
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, values, words, scale, scores = ctx.saved_tensors
        needs_x, needs_values, _, needs_bias, needs_scores = ctx.needs_input_grad[:5]
        of_scores = scores, scale, ctx.absolute, *ctx.geometry, ctx.backend
        if needs_x and needs_scores and not needs_values:
            grad_x, grad_scores = _ops.scored_conv2d_grads(grad_y, x, values, words, *of_scores)
            grad_bias = grad_y.sum((0, 2, 3)) if needs_bias else None
            return grad_x, None, None, grad_bias, grad_scores, None, None, None, None
        grad_scores = None
        if needs_scores:
            grad_scores = _ops.scored_conv2d_grad_scores(grad_y, x, values, *of_scores)
        grads = _conv2d_grads(ctx, grad_y, x, values, words, scale)
        return *grads, grad_scores, None, None, None, None


class GeluBatchNorm(Function):
    """``stats`` are constants to autograd; ``of_batch`` says that they move with x all the same."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, C, H, W]
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,  # [2, C]
        residual: Tensor | None,  # [B, C, H, W]
        of_batch: bool,
        eps: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, stats)
        ctx.of_batch, ctx.eps, ctx.backend = of_batch, eps, backend
        y: Tensor = _ops.gelu_batch_norm(x, stats, weight, bias, residual, eps, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, stats = ctx.saved_tensors
        grads = _norm_grads(ctx, _ops.gelu_batch_norm_grads, grad_y, x, stats, weight, ctx.of_batch)
        return *grads, None, grad_y if ctx.needs_input_grad[4] else None, None, None, None


class BatchNormRelu(Function):
    """As ``GeluBatchNorm``; the output is kept only where a residual decides with x what passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, C, H, W]
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,  # [2, C]
        residual: Tensor | None,  # [B, C, H, W]
        of_batch: bool,
        eps: float,
        backend: str,
    ) -> Tensor:
        y: Tensor = _ops.batch_norm_relu(x, stats, weight, bias, residual, eps, backend)
        ctx.save_for_backward(x, weight, bias, stats, None if residual is None else y)
        ctx.of_batch, ctx.eps, ctx.backend = of_batch, eps, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, bias, stats, y = ctx.saved_tensors
        if y is not None:
            grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
        vectors = stats, weight, bias, y is not None
        grads = _norm_grads(ctx, _ops.batch_norm_relu_grads, grad_y, x, *vectors, ctx.of_batch)
        return *grads, None, grad_y if ctx.needs_input_grad[4] else None, None, None, None


def _norm_grads(ctx: Any, op: Any, *args: Any) -> list[Tensor | None]:
    """Gradients of (x, weight, bias)."""
    if not any(ctx.needs_input_grad[:3]):
        return [None] * 3
    grad_x, grad_affine = op(*args, ctx.eps, ctx.backend)
    grads = zip(ctx.needs_input_grad, (grad_x, *grad_affine), strict=False)
    return [grad if needs else None for needs, grad in grads]


def _linear_grads(
    ctx: Any, grad_y: Tensor, x: Tensor, values: Tensor, words: Tensor, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    """Gradients of (x, values, words, bias)."""
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad[:4]
    grad_x = grad_values = None
    if needs_x:
        grad_x = _ops.masked_linear_grad_x(grad_y, values, words, scale, x.shape[1], ctx.backend)
    if needs_values:
        grad_values = _ops.masked_linear_grad_weight(grad_y, x, words, scale, ctx.backend)
    return grad_x, grad_values, None, grad_y.sum(0) if needs_bias else None


def _conv2d_grads(
    ctx: Any, grad_y: Tensor, x: Tensor, values: Tensor, words: Tensor, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    """Gradients of (x, values, words, bias)."""
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad[:4]
    grad_x = grad_values = None
    if needs_x:
        grad_x = _ops.masked_conv2d_grad_x(
            grad_y, x, values, words, scale, ctx.kernel_size, *ctx.geometry, ctx.backend
        )
    if needs_values:
        grad_values = _ops.masked_conv2d_grad_weight(
            grad_y, x, words, scale, ctx.kernel_size, *ctx.geometry, ctx.backend
        )
    return grad_x, grad_values, None, grad_y.sum((0, 2, 3)) if needs_bias else None
