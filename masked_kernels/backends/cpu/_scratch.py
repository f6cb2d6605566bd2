"""Memory for decoded weights that a thread keeps.

What the system hands out anew comes page by page, and that takes longer than to decode into it.
"""

import threading

import torch
from torch import Tensor

from ._native import native

_MOST_BYTES = 1 << 24  # kept of a dtype


class _Kept(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def scratch(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """``[rows, cols]`` of anything, the caller's until this thread asks for the next."""
    count = rows * cols
    memory = _kept.tensors.get(dtype)
    if memory is None or memory.numel() < count:
        with torch.inference_mode(False):  # so that it serves outside of that mode, too
            memory = torch.empty(count, dtype=dtype, device="cpu")
        if memory.nbytes <= _MOST_BYTES:
            _kept.tensors[dtype] = memory
    return memory[:count].view(rows, cols)


def decoded(values: Tensor, words: Tensor, cols: int, taps: int = 1) -> Tensor:
    """``decode`` into ``scratch``; rows ``[cols / taps, taps]`` become ``[taps, cols / taps]``."""
    out = scratch(words.shape[0], cols, values.dtype)
    native().decode_(out, values.contiguous(), words.contiguous(), 0, taps)
    return out
