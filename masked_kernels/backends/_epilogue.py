"""What fused ops do to their outputs, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"identity": lambda y: y, "gelu": F.gelu, "relu": torch.relu}


def finished(y: Tensor, affine: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """``affine[2] * activation(affine[0] * y + affine[1]) + affine[3] + residual``, channels_last.

    ``y`` and ``residual`` are ``[B, N, H, W]``, ``affine`` is ``[4, N]``.
    """
    gain_before, shift_before, gain_after, shift_after = affine.view(4, -1, 1, 1)
    y = ACTIVATIONS[activation](y * gain_before + shift_before) * gain_after + shift_after
    y = y if residual is None else y + residual
    return y.contiguous(memory_format=torch.channels_last)
