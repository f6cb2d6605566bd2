"""Memory-layout rules that every backend and the fake kernels share."""

import torch
from torch import Tensor


def words_per_row(cols: int) -> int:
    """Number of 32-bit words that hold ``cols`` bits."""
    return (cols + 31) // 32


def conv_memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for a strictly channels_last ``x`` (N, C, H, W); an ``x`` that is both counts
    as contiguous.
    """
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums over images of the dtype are kept in."""
    return torch.promote_types(dtype, torch.float32)


def conv_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of a convolution's output, in one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
