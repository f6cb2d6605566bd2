"""The native CPU backend: the kernels of ``csrc/cpu`` where they win, else decode and torch.

``masked_linear`` has three ways, and ``linear_plan`` chooses. *Aligned* serves prototypes whose
period fits the rows: x is scaled once and the bits alone select what is summed, at any batch in
fewer instructions than a dense product. *Direct* reads bits and values inside the multiplication
and never writes a dense weight: at small batch it moves a fraction of the bytes a dense layer
would. *Panels* decodes some rows at a time, which stay in the L2 cache, and multiplies them as a
dense product; in other dtypes than float32 it hands them to the library.
The kernels compute in float32; 16-bit inputs are widened where that is cheap. Threads are torch's
(``torch.set_num_threads``).
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ._native import isa, why_unavailable
from .bits import (
    decode,
    forget_thresholds,
    pack,
    popcount,
    select_nm,
    select_threshold,
    select_topk,
    select_topk_many,
    transpose,
    unpack,
)
from .compact import bind_compact_linear, compact_linear
from .conv2d import (
    bind_masked_conv2d,
    masked_conv2d,
    masked_conv2d_grad_weight,
    masked_conv2d_grad_x,
    scored_conv2d_grad_scores,
    scored_conv2d_grads,
)
from .conv2d_chain import bind_masked_conv2d_chain, masked_conv2d_chain
from .fused import masked_conv2d_fused
from .linear import (
    bind_masked_linear,
    masked_linear,
    masked_linear_grad_weight,
    masked_linear_grad_x,
    scored_linear_grad_scores,
)
from .norm import (
    batch_norm_relu,
    batch_norm_relu_grads,
    batch_norm_stats,
    gelu_batch_norm,
    gelu_batch_norm_grads,
    gelu_stats,
)
from .plan import bounds_of, linear_decision

_DTYPES = (torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.float64, torch.bool)
_BIND: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "masked_linear": bind_masked_linear,
    "compact_linear": bind_compact_linear,
    "masked_conv2d": bind_masked_conv2d,
    "masked_conv2d_chain": bind_masked_conv2d_chain,
}
_FLOAT32_ONLY = ("gelu_", "batch_norm_", "masked_conv2d_fused", "masked_conv2d_chain")


def why_not(op: str, *args: object) -> str | None:
    """None if ``op`` can run on ``args`` here, else the reason why not."""
    for arg in chain.from_iterable(a if isinstance(a, list) else (a,) for a in args):
        if not isinstance(arg, Tensor):
            continue
        if not arg.is_cpu:
            return f"a tensor is on {arg.device}"
        dtype = arg.dtype
        if dtype not in _DTYPES:
            return f"dtype {dtype} is none of float32, float64, float16, bfloat16"
        if dtype == torch.float64 and op.startswith(("select_", "scored_")):
            return f"{op} computes in float32 and got float64"
        if dtype not in (torch.float32, torch.int32) and op.startswith(_FLOAT32_ONLY):
            return f"{op} computes in float32 and got {dtype}"
    return None


def bind(op: str, *args: Any) -> Callable[[Tensor], Tensor] | None:
    """``op`` as ``backends.bind`` wants it; None where there is little to decide."""
    return _BIND[op](*args) if op in _BIND else None


def kernel_choice(op: str, *args: Any) -> str | None:
    """Which kernel would run ``op`` on ``args``, and why; None where there is no choice."""
    if op not in ("masked_linear", "compact_linear"):
        return None
    x, values, words = args[:3]
    sizes = x.shape[0], words.shape[0], x.shape[1], values.numel()
    is_compact = op == "compact_linear"
    decision = linear_decision(*sizes, x.dtype, bounds_of(isa()), is_compact)
    return f"{decision.plan} ({decision.why})"
