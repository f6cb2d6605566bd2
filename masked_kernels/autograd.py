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
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = affine = None
        grad = grad_y
        if x.is_contiguous(memory_format=torch.channels_last):  # copied here once, not in each op
            grad = grad_y.contiguous(memory_format=torch.channels_last)
        if needs_weight or needs_bias or (needs_x and ctx.of_batch):
            affine = _ops.gelu_batch_norm_grad_affine(grad, x, stats, ctx.eps, ctx.backend)
        if needs_x:
            grad_x = _ops.gelu_batch_norm_grad_x(
                grad, x, stats, weight, affine if ctx.of_batch else None, ctx.eps, ctx.backend
            )
        grad_weight = affine[0] if needs_weight and affine is not None else None
        grad_bias = affine[1] if needs_bias and affine is not None else None
        grad_residual = grad_y if ctx.needs_input_grad[4] else None
        return grad_x, grad_weight, grad_bias, None, grad_residual, None, None, None


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
