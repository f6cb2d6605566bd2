"""The Triton backend: GPUs with Triton installed; in Triton's interpreter also CPU tensors.

One kernel family a file, imported with the first call, so that importing the package does not
import the ``triton`` library and does not initialise CUDA. ``config.py`` chooses between kernels
and their tiles by pure functions.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_HOME = {
    "pack": "bits",
    "unpack": "bits",
    "popcount": "bits",
    "transpose": "bits",
    "decode": "bits",
    "select_topk": "topk",
    "select_topk_many": "topk",
    "select_threshold": "select",
    "select_nm": "select",
    "masked_linear": "linear",
    "masked_linear_grad_x": "linear_grad",
    "masked_linear_grad_weight": "linear_grad",
    "scored_linear_grad_scores": "linear_grad",
    "compact_linear": "compact",
    "masked_conv2d": "conv2d",
    "masked_conv2d_fused": "conv2d",
    "masked_conv2d_chain": "conv2d",
    "masked_conv2d_grad_x": "conv2d",
    "masked_conv2d_grad_weight": "conv2d_grad",
    "scored_conv2d_grad_scores": "conv2d_grad",
    "scored_conv2d_grads": "conv2d_grad",
    "gelu_stats": "norm",
    "gelu_batch_norm": "norm",
    "gelu_batch_norm_grads": "norm",
    "batch_norm_stats": "norm",
    "batch_norm_relu": "norm",
    "batch_norm_relu_grads": "norm",
}
"""The file of each op."""

_TAKEN = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool)
"""Dtypes of tensors that kernels read; a 0-d scale may have any and is read as float32."""

_COPIES = ("decode",)
"""Ops that move values of any dtype and compute nothing."""

_OLDEST = (8, 0)  # compute capability: bfloat16 and asynchronous copies


def forget_thresholds() -> None:
    """As ``backends.forget_thresholds`` says."""
    importlib.import_module(".topk_warm", __name__).forget_thresholds()


def check_scores() -> None:
    """As ``backends.check_scores`` says."""
    importlib.import_module(".select", __name__).check_scores()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def why_unavailable() -> str | None:
    """None if kernels can run in this process, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: run `pip install triton`"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device; set TRITON_INTERPRET=1 to run in the interpreter"
    return None


def why_not(op: str, *args: object) -> str | None:
    """None if ``op`` can run on ``args`` here, else the reason why not."""
    if op not in _HOME:
        return f"there is no {op} for Triton"
    for arg in _flat(args):
        if not isinstance(arg, Tensor):
            continue
        if arg.dtype not in _TAKEN and arg.dim() > 0 and op not in _COPIES:
            return f"{op} computes in float32 and got {str(arg.dtype).removeprefix('torch.')}"
        if arg.is_cuda:
            if reason := _too_old(arg.device):
                return reason
        elif not (interpreted() and arg.is_cpu):
            return f"a tensor is on {arg.device}, expected a CUDA device"
    return None


def _flat(args: tuple[object, ...]) -> Iterator[object]:
    """The arguments, lists taken apart."""
    for arg in args:
        if isinstance(arg, list):
            yield from arg
        else:
            yield arg


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes CPU tensors; it reads the
    variable at import.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST:
        return None
    have, need = (".".join(map(str, pair)) for pair in (capability, _OLDEST))
    return f"{device} has compute capability {have}, expected at least {need}"
