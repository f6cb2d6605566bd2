"""What masked layers are compared with: PyTorch's own ways, and the published training layer."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk

BF16_ERROR = 1e-2
"""Relative; three roundings to 8 bits are about 3e-3."""
CSR_ERROR = 8.0
"""In units of plain PyTorch's: it adds up a row term by term, which rounds more often."""
INT8_ERROR = 5e-2
"""Relative; weights and inputs rounded to 8 bits of their largest value are about 2e-2."""


def compiled(run: Callable[[Tensor], Tensor], example: Tensor, frozen: bool = False) -> Any:
    """``torch.compile`` for inference, compiled for ``example``; ``frozen`` folds the weights in.

    What cannot be compiled as one graph raises.
    """
    fast = torch.compile(
        run, fullgraph=True, dynamic=False, options={"freezing": True} if frozen else None
    )
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of PyTorch to itself
        fast(example)
    return fast


def linear_layer(weight: Tensor) -> nn.Linear:
    """For inference; the compiler folds weights in only where they are a module's."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.eval()


def conv_layer(weight: Tensor, groups: int, **options: Any) -> nn.Conv2d:
    """As ``linear_layer``."""
    outputs, inputs, *kernel = weight.shape
    layer = nn.Conv2d(
        inputs * groups, outputs, kernel, groups=groups, bias=False, device="meta", **options
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.eval()


def int8_linear(weight: Tensor) -> nn.Module:
    """PyTorch's dynamically quantised linear layer: int8 weights, inputs rounded in each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but what users have
        return torch.ao.quantization.quantize_dynamic(
            nn.Sequential(linear_layer(weight)), {nn.Linear}, dtype=torch.qint8
        )


def csr(weight: Tensor) -> Tensor:
    """The nonzeros with int32 indices, for which PyTorch calls the vendor's library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the layout is in beta
        sparse = weight.to_sparse_csr()
        return torch.sparse_csr_tensor(
            sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values(), weight.shape
        )


def int4_product(weight: Tensor, group: int = 128) -> Callable[[Tensor], Tensor]:
    """PyTorch's product with a weight of four bits, of which ``group`` in a row share a scale, on a
    GPU in bfloat16.
    """
    grouped = weight.float().unflatten(1, (-1, group))  # [rows, groups, group]
    lowest, highest = grouped.amin(2), grouped.amax(2)
    scale = (highest - lowest).clamp(min=1e-6) / 15
    codes = ((grouped - lowest[..., None]) / scale[..., None]).round().to(torch.uint8).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    # A code q stands for (q - 8) * scale + zero.
    scales = torch.stack([scale, lowest + 8 * scale], 2).transpose(0, 1).contiguous()
    facts = scales.to(weight.dtype)  # [groups, rows, 2]
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, facts)


def topk_and_scatter(scores: Tensor, keep: int) -> Tensor:
    """The best that plain PyTorch offers: a bool mask."""
    flat = scores.abs().flatten()
    kept = flat.topk(keep, sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, kept, True).view_as(scores)


def sort_and_scatter(keys: Tensor, keep: int) -> Tensor:
    """What edge-popup and PEMN publish: a full sort, then two indexed writes into a float mask."""
    order = keys.flatten().argsort()
    mask = keys.clone().flatten()
    drop = keys.numel() - keep
    mask[order[:drop]] = 0
    mask[order[drop:]] = 1
    return mask.view_as(keys)


class _PublishedMask(torch.autograd.Function):
    """``sort_and_scatter``, the gradient passed through (edge-popup; PEMN, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, keep: int) -> Tensor:
        return sort_and_scatter(keys, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class PublishedLayer(nn.Module):
    """The masked layer as published: the mask in float32, made anew in every call, times the
    weight, then the dense layer.

    Args:
        masked: the layer to copy scores, density, frozen values and bias of.
    """

    def __init__(self, masked: mk.nn.MaskedLinear | mk.nn.MaskedConv2d) -> None:
        super().__init__()
        assert isinstance(masked.rule, mk.TopK)
        values = masked.values
        weight = values.fill(masked.weight_shape) if isinstance(values, mk.Prototype) else values
        self.register_buffer("weight", weight.detach().clone())
        self.scores = nn.Parameter(masked.scores.detach().clone())
        self.bias = copy.deepcopy(masked.bias)
        self.keep = self.scores.numel() - int((1 - masked.rule.density) * self.scores.numel())
        self.conv = None
        if isinstance(masked, mk.nn.MaskedConv2d):
            self.conv = {
                "stride": masked.stride,
                "padding": masked.padding,
                "dilation": masked.dilation,
                "groups": masked.groups,
            }

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = _PublishedMask.apply(self.scores.abs(), self.keep)
        weight = self.weight * mask
        if self.conv is None:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, **self.conv)


def published(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with every masked layer as published."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, mk.nn.MaskedLinear | mk.nn.MaskedConv2d):
                setattr(parent, name, PublishedLayer(child))
    return unfused_(model)


def unfused_(model: nn.Module) -> nn.Module:
    """``model`` with its layers called one by one, as plain PyTorch does."""
    for module in model.modules():
        if isinstance(module, mk.nn.FusedSequential):
            module.fuse = False
    return model
