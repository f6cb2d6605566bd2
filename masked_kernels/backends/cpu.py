"""The native CPU backend: the kernels of ``csrc/cpu`` where they win, else decode and torch.

``masked_linear`` has three ways, and ``linear_plan`` chooses. *Aligned* serves prototypes whose
period fits the rows: x is scaled once and the bits alone select what is summed, at any batch in
fewer instructions than a dense product. *Direct* reads bits and values inside the multiplication
and never writes a dense weight: at small batch it moves a fraction of the bytes a dense layer
would. *Panels* decodes some rows at a time into one scratch that stays in the L2 cache and hands
it to the library: at large batch the decoding is lost in the multiplication.
The kernels compute in float32; 16-bit inputs are widened where that is cheap. Threads are torch's
(``torch.set_num_threads``).
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils.weak import WeakTensorKeyDictionary

from ._cpu_norm import gelu_batch_norm as gelu_batch_norm
from ._cpu_norm import gelu_batch_norm_grad_affine as gelu_batch_norm_grad_affine
from ._cpu_norm import gelu_batch_norm_grad_x as gelu_batch_norm_grad_x
from ._cpu_norm import gelu_stats as gelu_stats
from ._layout import conv_memory_format

_LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
_DTYPES = (torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.float64, torch.bool)
_PANEL_BYTES = 1 << 22  # small enough for the L2 caches, large enough to occupy the threads
_DEPTHWISE_KERNELS = (3, 5, 7, 9)  # that depthwise_grad serves
_ROWS_PER_PATTERN = 16  # one block of aligned_linear
_ROWS_PER_PATTERN_OF_MANY_TOKENS = 256  # so that tables pay against the library's product
_WEIGHTS_PER_PATTERN_OF_GRAD_X = 1 << 18  # each pattern is a product of its own


@functools.cache
def why_unavailable() -> str | None:
    """None once the native library is loaded and its instruction set settled, else the reason."""
    if not _LIBRARY.exists():
        return (
            f"the native module {_LIBRARY.name} is not built: "
            "run `pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(_LIBRARY)
        _native().isa()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{_LIBRARY.name}: {error}"
    return None


def why_not(op: str, *args: object) -> str | None:
    """None if ``op`` can run on ``args`` here, else the reason why not."""
    for arg in args:
        if not isinstance(arg, Tensor):
            continue
        if not arg.is_cpu:
            return f"a tensor is on {arg.device}"
        if arg.dtype == torch.float64 and op.startswith(("select_", "scored_")):
            return f"{op} computes in float32 and got float64"
        if arg.dtype != torch.float32 and op.startswith("gelu_"):
            return f"{op} computes in float32 and got {arg.dtype}"
        if arg.dtype not in _DTYPES:
            return f"dtype {arg.dtype} is none of float32, float64, float16, bfloat16"
    return None


def linear_plan(
    tokens: int, rows: int, cols: int, period: int, dtype: torch.dtype, isa: str
) -> Literal["aligned", "direct", "panels"]:
    """How to multiply ``tokens`` inputs with a weight ``[rows, cols]`` of the given period.

    The bounds are where the ways cross over in time on a 2-core AVX-512 machine.
    """
    if dtype == torch.float64 or isa == "scalar":
        return "panels"
    if isa == "avx512" and (dtype == torch.float32 or tokens <= 32):
        patterns = row_patterns(cols, period)
        least = _ROWS_PER_PATTERN if tokens <= 32 else _ROWS_PER_PATTERN_OF_MANY_TOKENS
        if patterns is not None and rows >= least * patterns:
            return "aligned"
    if 2 * period > rows * cols:  # the values are read from memory anew for every few tokens
        most = 8 if dtype == torch.float32 else 0  # and widening them costs as much as decoding
    elif isa == "avx2":
        most = 8
    else:
        most = 128 if cols >= 1024 else 32  # short rows spend their time on adding up lanes
    return "direct" if tokens <= most else "panels"


def row_patterns(cols: int, period: int) -> int | None:
    """The number of distinct weight rows if the period divides ``cols`` or is a multiple of it."""
    if cols == 0 or period == 0 or cols % period == 0:
        return 1
    return period // cols if period % cols == 0 else None


def pack(mask: Tensor) -> Tensor:
    words: Tensor = _native().pack(mask.contiguous())
    return words


def unpack(words: Tensor, cols: int) -> Tensor:
    mask: Tensor = _native().unpack(words.contiguous(), cols)
    return mask


def popcount(words: Tensor) -> Tensor:
    counts: Tensor = _native().popcount(words.contiguous())
    return counts


def transpose(words: Tensor, cols: int) -> Tensor:
    transposed: Tensor = _native().transpose(words.contiguous(), cols)
    return transposed


def select_topk(scores: Tensor, drop: int, absolute: bool) -> Tensor:
    return _selected(*_native().select_topk(_float(scores), drop, absolute))


def select_threshold(scores: Tensor, threshold: float) -> Tensor:
    # torch compares a tensor with a number in the dtype of the tensor.
    rounded = torch.tensor(threshold, dtype=scores.dtype).item()
    return _selected(*_native().select_threshold(_float(scores), rounded))


def select_nm(scores: Tensor, n: int, m: int, absolute: bool) -> Tensor:
    return _selected(*_native().select_nm(_float(scores), n, m, absolute))


def decode(values: Tensor, words: Tensor, cols: int) -> Tensor:
    out = values.new_empty((words.shape[0], cols))
    _native().decode_(out, values.contiguous(), words.contiguous(), 0)
    return out


def masked_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    rows = words.shape[0]
    plan = linear_plan(x.shape[0], rows, x.shape[1], values.numel(), x.dtype, _isa())
    if plan == "aligned":
        return _aligned_linear(x, values, words, bias, scale)
    if plan == "direct":
        return _direct_linear(x, values, words, bias, scale)
    y = x.new_empty((x.shape[0], rows))
    for begin, end, panel in _panels(values, words, x.shape[1]):
        out = y[:, begin:end]
        added = out if bias is None else bias[begin:end]
        torch.addmm(added, x, panel.t(), beta=int(bias is not None), alpha=_number(scale), out=out)
    return y


def masked_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    rows = words.shape[0]
    plan = linear_plan(grad_y.shape[0], rows, cols, values.numel(), grad_y.dtype, _isa())
    patterns = row_patterns(cols, values.numel()) or 1
    if plan == "aligned" and rows * cols >= _WEIGHTS_PER_PATTERN_OF_GRAD_X * patterns:
        return _aligned_linear_grad_x(grad_y, values, words, scale, cols)
    if grad_y.dtype in (torch.float16, torch.bfloat16) or rows == 0:
        # A sum over panels would round to 16 bits after each of them.
        return grad_y @ _scaled_(decode(values, words, cols), scale)
    grad_x = grad_y.new_empty((grad_y.shape[0], cols))
    for begin, end, panel in _panels(values, words, cols):
        grad_x.addmm_(grad_y[:, begin:end], panel, beta=int(begin > 0), alpha=_number(scale))
    return grad_x


def masked_linear_grad_weight(
    grad_y: Tensor, x: Tensor, words: Tensor, scale: Tensor | None
) -> Tensor:
    return _masked_(_scaled_(grad_y.t() @ x, scale), words)


def scored_linear_grad_scores(
    grad_y: Tensor, x: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    return _grad_scores(grad_y.t() @ x, values, scores, scale, absolute)


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
    memory_format = conv_memory_format(x)
    if _is_pointwise(x, kernel_size, stride, padding, groups):
        y = masked_linear(_as_tokens(x), values, words, bias, scale)
        return _as_image(y, x).contiguous(memory_format=torch.channels_last)
    weight = _conv_weight(values, words, scale, x.shape[1] // groups, kernel_size)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=memory_format)


def masked_conv2d_grad_x(
    grad_y: Tensor,
    values: Tensor,
    words: Tensor,
    scale: Tensor | None,
    x_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if _is_pointwise(grad_y, kernel_size, stride, padding, groups):
        grad_tokens = masked_linear_grad_x(_as_tokens(grad_y), values, words, scale, x_size[1])
        return _as_image(grad_tokens, grad_y).contiguous(memory_format=torch.channels_last)
    weight = _conv_weight(values, words, scale, x_size[1] // groups, kernel_size)
    memory_format = conv_memory_format(grad_y)
    # Only the size and layout of x matter; conv2d_input passes one of no layout, and is ten times
    # slower on channels_last.
    x = torch.empty(x_size, dtype=grad_y.dtype, memory_format=memory_format)
    grad_x: Tensor = torch.ops.aten.convolution_backward(
        grad_y,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]
    return grad_x.contiguous(memory_format=memory_format)


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
    grad = _conv_grad_weight(grad_y, x, size, stride, padding, dilation, groups)
    return _masked_(_scaled_(grad, scale), words)


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
    size = tuple(scores.shape)
    grad = _conv_grad_weight(grad_y, x, size, stride, padding, dilation, groups)
    return _grad_scores(grad, values, scores, scale, absolute)


def _native() -> Any:
    return torch.ops.masked_kernels_cpu


@functools.cache
def _isa() -> str:
    name: str = _native().isa()
    return name


def _float(t: Tensor) -> Tensor:
    return t.float().contiguous()


def _optional_float(t: Tensor | None) -> Tensor | None:
    return None if t is None else _float(t)


def _number(scale: Tensor | None) -> float:
    return 1.0 if scale is None else scale.item()


def _scaled_(t: Tensor, scale: Tensor | None) -> Tensor:
    return t if scale is None else t.mul_(scale)


def _selected(words: Tensor, nan: int) -> Tensor:
    if nan >= 0:
        raise ValueError(f"scores: NaN at flat index {nan}; scores must not contain NaN")
    return words


def _direct_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    y: Tensor = _native().masked_linear(
        _float(x), _float(values), words.contiguous(), _optional_float(bias), _optional_float(scale)
    )
    return y.to(x.dtype)


def _aligned_linear(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    patterns = row_patterns(x.shape[1], values.numel()) or 1
    y: Tensor = _native().aligned_linear(
        _float(x),
        _float(values),
        _tiles(words, x.shape[1], patterns),
        words.shape[0],
        _optional_float(bias),
        _optional_float(scale),
    )
    return y.to(x.dtype)


def _aligned_linear_grad_x(
    grad_y: Tensor, values: Tensor, words: Tensor, scale: Tensor | None, cols: int
) -> Tensor:
    """For each row pattern: the binary product with its transposed bits, times its values."""
    patterns = row_patterns(cols, values.numel()) or 1
    row_values = _float(values).repeat(max(cols // values.numel(), 1)).view(patterns, cols)
    one = row_values.new_ones(1)
    grad_x = None
    for pattern in range(patterns):
        bits = transpose(words[pattern::patterns], cols)
        tiles = _native().aligned_tiles(bits, words[pattern::patterns].shape[0], 1)
        grad_tokens = _float(grad_y[:, pattern::patterns])
        part = _native().aligned_linear(grad_tokens, one, tiles, cols, None, _optional_float(scale))
        part *= row_values[pattern]
        grad_x = part if grad_x is None else grad_x.add_(part)
    assert isinstance(grad_x, Tensor)
    return grad_x.to(grad_y.dtype)


_tiles_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The tiles of masks in use, dropped with the mask's words: re-laying costs a batch-1 product."""


def _tiles(words: Tensor, cols: int, patterns: int) -> Tensor:
    """The words as ``aligned_linear`` reads them."""
    tiles: Tensor
    if words.is_inference():  # has no version, so a change would go unseen
        tiles = _native().aligned_tiles(words.contiguous(), cols, patterns)
        return tiles
    key = (words._version, cols, patterns)
    known, tiles = _tiles_of.get(words, (None, words))
    if known != key:
        tiles = _native().aligned_tiles(words.contiguous(), cols, patterns)
        _tiles_of[words] = key, tiles
    return tiles


def _is_pointwise(
    x: Tensor, kernel_size: Sequence[int], stride: list[int], padding: list[int], groups: int
) -> bool:
    """Whether the convolution is a linear layer over the pixels of a channels_last image."""
    return (
        conv_memory_format(x) == torch.channels_last
        and groups == 1
        and list(kernel_size) == [1, 1]
        and list(stride) == [1, 1]
        and list(padding) == [0, 0]
    )


def _as_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` channels_last as ``[B * H * W, C]``."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """``[B * H * W, C]`` as channels_last with the pixels of ``like``."""
    batch, _, height, width = like.shape
    return tokens.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _panels(values: Tensor, words: Tensor, cols: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (begin, end, weight rows [begin, end)); each panel is good until the next step."""
    values, words = values.contiguous(), words.contiguous()
    rows = words.shape[0]
    height = max(64, _PANEL_BYTES // max(cols * values.element_size(), 1))
    scratch = values.new_empty((min(height, rows), cols))
    for begin in range(0, rows, height):
        end = min(begin + height, rows)
        panel = scratch[: end - begin]
        _native().decode_(panel, values, words, begin)
        yield begin, end, panel


def _masked_(weight: Tensor, words: Tensor) -> Tensor:
    """Clear, in place, the elements of a contiguous weight whose bit is not set."""
    if weight.numel():
        matrix = weight.view(words.shape[0], -1)
        _native().decode_(matrix, matrix, words.contiguous(), 0)
    return weight


def _conv_weight(
    values: Tensor, words: Tensor, scale: Tensor | None, channels: int, kernel_size: list[int]
) -> Tensor:
    kh, kw = kernel_size
    weight = decode(values, words, channels * kh * kw)
    return _scaled_(weight, scale).view(-1, channels, kh, kw)


def _conv_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    size: tuple[int, ...],  # [N, C / groups, kh, kw]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of the effective weight, contiguous."""
    if _is_pointwise(x, size[2:], stride, padding, groups):
        return (_as_tokens(grad_y).t() @ _as_tokens(x)).view(size)
    if (
        conv_memory_format(x) == torch.channels_last
        and x.dtype == torch.float32
        and groups == x.shape[1] == size[0]
        and size[2] == size[3]
        and size[2] in _DEPTHWISE_KERNELS
        and list(stride) == list(dilation) == [1, 1]
    ):
        pixels = (t.permute(0, 2, 3, 1).contiguous() for t in (grad_y, x))
        grad: Tensor = _native().depthwise_grad(*pixels, size[2], *padding)
        return grad.view(size)
    grad = conv2d_weight(x, size, grad_y, stride, padding, dilation, groups)
    return grad.contiguous()


def _grad_scores(
    grad: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> Tensor:
    grad = _float(grad)
    signs = _float(scores) if absolute else None
    _native().scored_grad_(grad, _float(values), signs, _optional_float(scale))
    return grad.to(scores.dtype)
