"""masked_conv2d and its gradient by x as products without an im2col: a tile of x is gathered while
it is loaded, by the strides of x, so both memory formats are read in place.

Columns of the weight are in its flat order (channel, then kernel position). A convolution with one
channel a group goes to ``depthwise.py``, a pointwise one on channels_last to ``linear.py``.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .._layout import conv_memory_format
from . import config, depthwise, linear, linear_grad
from ._conv import Geometry, as_image, as_tokens, input_at, pixel_of
from ._helpers import (
    advanced,
    dot_dtype,
    dot_precision,
    load_weight,
    on_device,
    pointer,
    row_starts,
    wrapped,
)


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
    geometry = Geometry.of(x.shape, kernel_size, stride, padding, dilation, groups)
    if geometry.pointwise and is_channels_last(x):
        return as_image(linear.masked_linear(as_tokens(x), values, words, bias, scale), x)
    y = x.new_empty(
        (x.shape[0], words.shape[0], *geometry.out_size), memory_format=conv_memory_format(x)
    )
    if y.numel() == 0:
        return y
