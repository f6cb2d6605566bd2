"""Schemas, fake kernels and dispatch of every op; docs/architecture.md says what each computes.

This file imports torch only. The ops carry no autograd: ``autograd.py`` is what users differentiate
through.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .backends._fused import masked_conv2d_chain as chain
from .backends._layout import at_least_float32, conv_memory_format, conv_size, words_per_row

_library = torch.library.Library("masked_kernels", "DEF")

NAMES: list[str] = []
"""Every op, in the order of definition."""


def _define(name: str, arguments: str, fake: Callable[..., Any], result: str = "Tensor") -> Any:
    """Register ``masked_kernels::name(arguments, str backend) -> result``; return what calls it."""

    NAMES.append(name)

    def run(*args: Any) -> Any:
        # A view of a tensor made here must not keep that one alive for autograd: the engine adds
        # gradients in place only where nothing else holds their storage.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return select(name, args[-1], *args[:-1])(*args[:-1])

    _library.define(
        f"{name}({arguments}, str backend) -> {result}", tags=(torch.Tag.pt2_compliant_tag,)
    )
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"masked_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.masked_kernels, name).default

    if "Tensor[]" in arguments:
        return op

    def call(*args: Any) -> Any:
        return run(*args) if _is_plain_call(args) else op(*args)

    return call


def is_watched() -> bool:
    """Whether a compiler, a mode or a transform needs to see what is called."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter, int, float, bool, str, list, type(None)))
"""Types of arguments; a list is of integers."""


def _is_plain_call(args: tuple[Any, ...]) -> bool:
    """Whether nobody needs to see an op: no compiler, mode, transform, subclass, gradient or tensor
    without data.

    Then the backend is called at once. The dispatcher's way to a kernel in Python costs 10 µs, as
    much as a small layer.
    """
    if is_watched() or not _PLAIN.issuperset(map(type, args)):
        return False
    wants_grad = torch.is_grad_enabled()
    return not any(
        isinstance(arg, Tensor) and (arg.is_meta or (wants_grad and arg.requires_grad))
        for arg in args
    )


def _fake_words(t: Tensor, *_: Any) -> Tensor:
    rows, cols = t.shape
    return t.new_empty((rows, words_per_row(cols)), dtype=torch.int32)


def _fake_channels(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=at_least_float32(x.dtype))


def _fake_image(x: Tensor) -> Tensor:
    return x.new_empty(x.shape).contiguous(memory_format=conv_memory_format(x))


def _fake_masked_conv2d(
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
    backend: str,
) -> Tensor:
    spatial = map(conv_size, x.shape[2:], kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], words.shape[0], *spatial)).contiguous(
        memory_format=conv_memory_format(x)
    )


def _fake_masked_conv2d_fused(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,
    *geometry: Any,
) -> Tensor:
    spatial = map(conv_size, x.shape[2:], *geometry[:4])
    return torch.empty(
        (x.shape[0], words.shape[0], *spatial),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _fake_masked_conv2d_grad_x(grad_y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return grad_y.new_empty(x.shape).contiguous(memory_format=conv_memory_format(grad_y))


def _fake_masked_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    words: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    backend: str,
) -> Tensor:
    return grad_y.new_empty((words.shape[0], x.shape[1] // groups, *kernel_size))


_CONV = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"

pack = _define("pack", "Tensor mask", _fake_words)
unpack = _define(
    "unpack",
    "Tensor words, SymInt cols",
    lambda w, cols, _: w.new_empty((w.shape[0], cols), dtype=torch.bool),
)
popcount = _define(
    "popcount", "Tensor words", lambda w, _: w.new_empty(w.shape[0], dtype=torch.int64)
)
transpose = _define(
    "transpose",
    "Tensor words, SymInt cols",
    lambda w, cols, _: w.new_empty((cols, words_per_row(w.shape[0]))),
)
select_topk = _define("select_topk", "Tensor scores, SymInt drop, bool absolute", _fake_words)
select_topk_many = _define(
    "select_topk_many",
    "Tensor[] scores, SymInt[] drops, bool absolute",
    lambda scores, *_: [_fake_words(s) for s in scores],
    result="Tensor[]",
)
select_threshold = _define("select_threshold", "Tensor scores, float threshold", _fake_words)
select_nm = _define("select_nm", "Tensor scores, SymInt n, SymInt m, bool absolute", _fake_words)
decode = _define(
    "decode",
    "Tensor values, Tensor words, SymInt cols",
    lambda v, w, cols, _: v.new_empty((w.shape[0], cols)),
)
masked_linear = _define(
    "masked_linear",
    "Tensor x, Tensor values, Tensor words, Tensor? bias, Tensor? scale",
    lambda x, v, w, *_: x.new_empty((x.shape[0], w.shape[0])),
)
masked_linear_grad_x = _define(
    "masked_linear_grad_x",
    "Tensor grad_y, Tensor values, Tensor words, Tensor? scale, SymInt cols",
    lambda g, v, w, s, cols, _: g.new_empty((g.shape[0], cols)),
)
masked_linear_grad_weight = _define(
    "masked_linear_grad_weight",
    "Tensor grad_y, Tensor x, Tensor words, Tensor? scale",
    lambda g, x, *_: g.new_empty((g.shape[1], x.shape[1])),
)
scored_linear_grad_scores = _define(
    "scored_linear_grad_scores",
    "Tensor grad_y, Tensor x, Tensor values, Tensor scores, Tensor? scale, bool absolute",
    lambda g, x, v, scores, *_: scores.new_empty(scores.shape),
)
compact_linear = _define(
    "compact_linear",
    "Tensor x, Tensor kept, Tensor words, Tensor? bias, Tensor? scale",
    lambda x, kept, w, *_: x.new_empty((x.shape[0], w.shape[0])),
)
masked_conv2d = _define(
    "masked_conv2d",
    "Tensor x, Tensor values, Tensor words, Tensor? bias, Tensor? scale, "
    f"SymInt[] kernel_size, {_CONV}",
    _fake_masked_conv2d,
)
masked_conv2d_fused = _define(
    "masked_conv2d_fused",
    "Tensor x, Tensor values, Tensor words, Tensor affine, str activation, Tensor? residual, "
    f"SymInt[] kernel_size, {_CONV}",
    _fake_masked_conv2d_fused,
)
masked_conv2d_chain = _define(
    "masked_conv2d_chain",
    "Tensor x, Tensor[] values, Tensor[] words, Tensor[] affines, str[] activations, "
    "bool[] adds_input, SymInt[] geometry",
    lambda x, *operands: chain(_fake_masked_conv2d_fused, x, *operands[:-1]),
)
masked_conv2d_grad_x = _define(
    "masked_conv2d_grad_x",
    "Tensor grad_y, Tensor x, Tensor values, Tensor words, Tensor? scale, "
    f"SymInt[] kernel_size, {_CONV}",
    _fake_masked_conv2d_grad_x,
)
masked_conv2d_grad_weight = _define(
    "masked_conv2d_grad_weight",
    f"Tensor grad_y, Tensor x, Tensor words, Tensor? scale, SymInt[] kernel_size, {_CONV}",
    _fake_masked_conv2d_grad_weight,
)
scored_conv2d_grad_scores = _define(
    "scored_conv2d_grad_scores",
    f"Tensor grad_y, Tensor x, Tensor values, Tensor scores, Tensor? scale, bool absolute, {_CONV}",
    lambda g, x, v, scores, *_: scores.new_empty(scores.shape),
)
scored_conv2d_grads = _define(
    "scored_conv2d_grads",
    "Tensor grad_y, Tensor x, Tensor values, Tensor words, Tensor scores, Tensor? scale, "
    f"bool absolute, {_CONV}",
    lambda g, x, v, w, scores, *_: (
        _fake_masked_conv2d_grad_x(g, x),
        scores.new_empty(scores.shape),
    ),
    result="(Tensor, Tensor)",
)
gelu_stats = _define("gelu_stats", "Tensor x", lambda x, _: _fake_channels(x))
gelu_batch_norm = _define(
    "gelu_batch_norm",
    "Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, float eps",
    lambda x, *_: _fake_image(x),
)
gelu_batch_norm_grads = _define(
    "gelu_batch_norm_grads",
    "Tensor grad_y, Tensor x, Tensor stats, Tensor? weight, bool of_batch, float eps",
    lambda g, x, *_: (_fake_image(x), _fake_channels(x)),
    result="(Tensor, Tensor)",
)
batch_norm_stats = _define("batch_norm_stats", "Tensor x", lambda x, _: _fake_channels(x))
batch_norm_relu = _define(
    "batch_norm_relu",
    "Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, float eps",
    lambda x, *_: _fake_image(x),
)
batch_norm_relu_grads = _define(
    "batch_norm_relu_grads",
    "Tensor grad_y, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, bool is_of_norm, "
    "bool of_batch, float eps",
    lambda g, x, *_: (_fake_image(x), _fake_channels(x)),
    result="(Tensor, Tensor)",
)
