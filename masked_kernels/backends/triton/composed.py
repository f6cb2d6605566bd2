"""Ops made of other kernels and of torch: no kernel of their own would save a pass worth having."""

import functools

import torch.nn.functional as F
from torch import Tensor

from .. import _fused
from .bits import unpack
from .conv2d import masked_conv2d


def compact_linear(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    mask = unpack(words, x.shape[1])
    if kept.numel() != (count := int(mask.sum())):
        raise ValueError(f"kept: got {kept.numel()} values, expected {count}, as many as set bits")
    weight = kept.new_zeros(mask.shape).masked_scatter_(mask, kept)
    return F.linear(x, weight if scale is None else weight.mul_(scale), bias)


masked_conv2d_fused = functools.partial(_fused.masked_conv2d_fused, masked_conv2d)
masked_conv2d_chain = functools.partial(_fused.masked_conv2d_chain, masked_conv2d_fused)
