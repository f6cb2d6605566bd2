"""The specification: every op in plain PyTorch, on any device and in any float dtype, with float64
for truth.

It unpacks, multiplies and calls the library; it is never clever. The other backends are judged by
it, and it is a working backend itself, last in the order of preference.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from . import _fused, _grads
from ._layout import at_least_float32, conv_memory_format, words_per_row


def why_unavailable() -> str | None:
    return None


def why_not(op: str, *args: object) -> str | None:
    return None


def pack(mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    words = words_per_row(cols)
    bits = F.pad(mask.long(), (0, 32 * words - cols)).view(rows, words, 32)
    unsigned = (bits << torch.arange(32, device=mask.device)).sum(-1)  # [R, W], 0 .. 2^32 - 1
    return torch.where(unsigned < 2**31, unsigned, unsigned - 2**32).to(torch.int32)


def unpack(words: Tensor, cols: int) -> Tensor:
    rows = words.shape[0]
    bits = (
        words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)
    ) & 1  # [R, W, 32]
    return bits.view(rows, 32 * words.shape[1])[:, :cols].bool()


def popcount(words: Tensor) -> Tensor:
    return unpack(words, 32 * words.shape[1]).sum(1)


def transpose(words: Tensor, cols: int) -> Tensor:
    return pack(unpack(words, cols).t())


def select_topk(scores: Tensor, drop: int, absolute: bool) -> Tensor:
    return _select_topk(scores, drop, absolute, "scores")


def select_topk_many(scores: list[Tensor], drops: list[int], absolute: bool) -> list[Tensor]:
    return [
        _select_topk(s, drop, absolute, f"scores[{i}]")
        for i, (s, drop) in enumerate(zip(scores, drops, strict=True))
    ]


def select_threshold(scores: Tensor, threshold: float) -> Tensor:
    return pack(_keys(scores, absolute=False) > threshold)


def select_nm(scores: Tensor, n: int, m: int, absolute: bool) -> Tensor:
    rows, cols = scores.shape
    keys = _keys(scores, absolute)
    whole = cols - cols % m
    groups = _largest(keys[:, :whole].reshape(rows, whole // m, m), n).view(rows, whole)
    return pack(torch.cat([groups, _largest(keys[:, whole:], n)], dim=1))


def decode(values: Tensor, words: Tensor, cols: int) -> Tensor:
    mask = unpack(words, cols)
    return torch.where(mask, _fill(values, mask.shape), 0)


def masked_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    return F.linear(x, _scaled(decode(values, words, x.shape[1]), scale), bias)


def masked_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    return grad_y @ _scaled(decode(values, words, cols), scale)


def masked_linear_grad_weight(
    grad_y: Tensor, x: Tensor, words: Tensor, scale: Tensor | None
) -> Tensor:
    return torch.where(unpack(words, x.shape[1]), _scaled(grad_y.t() @ x, scale), 0)


def scored_linear_grad_scores(
    grad_y: Tensor, x: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    return _grad_scores(grad_y.t() @ x, values, scores, scale, absolute)


def compact_linear(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    mask = unpack(words, x.shape[1])
    if kept.numel() != (count := int(mask.sum())):
        raise ValueError(f"kept: got {kept.numel()} values, expected {count}, as many as set bits")
    weight = kept.new_zeros(mask.shape).masked_scatter_(mask, kept)
    return F.linear(x, _scaled(weight, scale), bias)


def masked_conv2d(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    weight = _conv_weight(values, words, scale, x.shape[1] // groups, kernel_size)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=conv_memory_format(x))


masked_conv2d_fused = functools.partial(_fused.masked_conv2d_fused, masked_conv2d)
masked_conv2d_chain = functools.partial(_fused.masked_conv2d_chain, masked_conv2d_fused)


def masked_conv2d_grad_x(
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    weight = _conv_weight(values, words, scale, x.shape[1] // groups, kernel_size)
    grad_x: Tensor = conv2d_input(x.shape, weight, grad_y, stride, padding, dilation, groups)
    return grad_x.contiguous(memory_format=conv_memory_format(grad_y))


def masked_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = (grad_y.shape[1], x.shape[1] // groups, *kernel_size)
    grad = conv2d_weight(x, size, grad_y, stride, padding, dilation, groups)
    mask = unpack(words, size[1] * size[2] * size[3]).view(size)
    return torch.where(mask, _scaled(grad, scale), 0).contiguous()


def scored_conv2d_grad_scores(
    grad_y: Tensor,
    x: Tensor,
    values: Tensor,
    scores: Tensor,
    scale: Tensor | None,
    absolute: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    grad = conv2d_weight(x, scores.shape, grad_y, stride, padding, dilation, groups)
    return _grad_scores(grad, values, scores, scale, absolute).contiguous()


scored_conv2d_grads = functools.partial(
    _grads.scored_conv2d_grads, masked_conv2d_grad_x, scored_conv2d_grad_scores
)


def gelu_stats(x: Tensor) -> Tensor:
    return batch_norm_stats(F.gelu(_widened(x)))


def gelu_batch_norm(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    y = _normalised(F.gelu(_widened(x)), stats, weight, bias, eps)
    if residual is not None:
        y = y + residual
    return _image_like(x, y)


def gelu_batch_norm_grads(
    grad_y: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, of_batch: bool, eps: float
) -> tuple[Tensor, Tensor]:
    wide = _widened(x)
    grad, grad_affine = _batch_norm_grads(grad_y, F.gelu(wide), stats, weight, of_batch, eps)
    return _image_like(x, torch.ops.aten.gelu_backward(grad, wide)), grad_affine


def batch_norm_stats(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(_widened(x), _over_pixels(x), correction=0)
    return torch.stack([mean, var])


def batch_norm_relu(
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    y = _normalised(_widened(x), stats, weight, bias, eps)
    if residual is not None:
        y = y + residual
    return _image_like(x, F.relu(y))


def batch_norm_relu_grads(
    grad_y: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    is_of_norm: bool,
    of_batch: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    wide, grad = _widened(x), _widened(grad_y)
    if not is_of_norm:
        y = _normalised(wide, stats, weight, bias, eps)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_x, grad_affine = _batch_norm_grads(grad, wide, stats, weight, of_batch, eps)
    return _image_like(x, grad_x), grad_affine


def _batch_norm_grads(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, of_batch: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, [2, C], of weight and bias; mean and variance move with x where they are
    of the batch.
    """
    grad = _widened(grad)
    normalised = _normalised(x, stats, None, None, eps)
    grad_affine = torch.stack([(grad * normalised).sum(_over_pixels(x)), grad.sum(_over_pixels(x))])
    if of_batch:
        grad_weight, grad_bias = (_per_channel(t, x) for t in grad_affine)
        pixels = x.numel() // max(x.shape[1], 1)
        grad = grad - (grad_bias + normalised * grad_weight) / pixels
    factor = (_widened(stats)[1] + eps).rsqrt()
    return grad * _per_channel(factor if weight is None else factor * weight, x), grad_affine


def _widened(t: Tensor) -> Tensor:
    return t.to(at_least_float32(t.dtype))


def _over_pixels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _normalised(
    x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    mean, var = _widened(stats)
    y = (x - _per_channel(mean, x)) * _per_channel((var + eps).rsqrt(), x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x)


def _image_like(x: Tensor, image: Tensor) -> Tensor:
    return image.to(x.dtype, memory_format=conv_memory_format(x))


def _select_topk(scores: Tensor, drop: int, absolute: bool, name: str) -> Tensor:
    keys = _keys(scores, absolute, name).flatten()
    mask = torch.ones_like(keys, dtype=torch.bool)
    mask[keys.argsort(stable=True)[:drop]] = False
    return pack(mask.view(scores.shape))


def _keys(scores: Tensor, absolute: bool, name: str = "scores") -> Tensor:
    if (nan := scores.isnan()).any():
        index = int(nan.flatten().int().argmax())
        raise ValueError(f"{name}: NaN at flat index {index}; scores must not contain NaN")
    return scores.abs() if absolute else scores


def _largest(keys: Tensor, n: int) -> Tensor:
    """True at the n largest along the last dimension; among equals the lower index is dropped
    first.
    """
    order = keys.argsort(dim=-1, stable=True)
    dropped = order[..., : max(keys.shape[-1] - n, 0)]
    return torch.ones_like(keys, dtype=torch.bool).scatter(-1, dropped, False)


def _fill(values: Tensor, shape: torch.Size) -> Tensor:
    """Element i of the row-major result is ``values.flatten()[i % values.numel()]``."""
    flat = values.flatten()
    index = torch.arange(shape.numel(), device=values.device)
    return flat[index % max(flat.numel(), 1)].view(shape)


def _conv_weight(
    values: Tensor, words: Tensor, scale: Tensor | None, channels: int, kernel_size: list[int]
) -> Tensor:
    kh, kw = kernel_size
    return _scaled(decode(values, words, channels * kh * kw).view(-1, channels, kh, kw), scale)


def _scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    return t if scale is None else t * scale


def _grad_scores(
    grad: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    grad = grad.to(torch.promote_types(grad.dtype, scores.dtype))  # one rounding less for 16-bit x
    grad = _scaled(grad * _fill(values, grad.shape), scale)
    return (grad * scores.sign() if absolute else grad).to(scores.dtype)
