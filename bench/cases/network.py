"""Packed networks and the blocks that they are made of."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import masked_kernels as mk

from ..nets import IMAGE
from ..problem import Case, Problem, Provider, against_float64, channels_last
from ..providers import compiled, published, unfused_

BF16_NETWORK_ERROR = 5e-2
"""Relative, of the logits: what many layers of 8-bit roundings add up to is about 1e-2."""
ROTATION = 4
RATIO = 1e-4


def masked_convmixer(dim: int, depth: int) -> nn.Module:
    """ConvMixer for 32 x 32 images, masked, with one short aligned prototype; fixed numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mk.models.create_model("convmixer", dim=dim, depth=depth)
    mk.mask_model_(model, mk.recipes.random_padding(RATIO, align=True), seed=0)
    return model


@dataclass(frozen=True)
class PackedNetwork(Case):
    """A packed ConvMixer's logits of ``batch`` CIFAR images, NCHW as they come."""

    dim: int
    depth: int
    batch: int
    group: ClassVar[str] = "network"

    @property
    def name(self) -> str:
        return f"packed ConvMixer-{self.dim}/{self.depth} batch={self.batch}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(
            torch.randn(self.batch, *IMAGE, generator=generator) for _ in range(ROTATION)
        )
        return _problem(masked_convmixer(self.dim, self.depth).eval(), inputs, backend)


@dataclass(frozen=True)
class PackedBlock(Case):
    """A block of a packed ConvMixer, or its depthwise half: ``x + norm(gelu(conv(x)))``; inputs
    channels_last, ``[batch, dim, 16, 16]``.
    """

    dim: int
    batch: int
    part: Literal["depthwise", "block"]
    group: ClassVar[str] = "network"

    @property
    def name(self) -> str:
        part = {"depthwise": "depthwise 5x5 + gelu + norm + residual", "block": "block"}[self.part]
        return f"packed ConvMixer-{self.dim} {part} batch={self.batch}"

    def build(self, backend: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.dim, 16, 16)
        inputs = tuple(channels_last(torch.randn(size, generator=generator)) for _ in range(2))
        block = masked_convmixer(self.dim, depth=1).get_submodule("blocks.0")
        if self.part == "depthwise":
            block.pointwise = nn.Identity()
        return _problem(block.eval(), inputs, backend)


def _problem(masked: nn.Module, inputs: tuple[Tensor, ...], backend: str) -> Problem:
    """The packed form beside every dense one. All get the same input; who likes another layout
    converts it on the clock.
    """
    dense = copy.deepcopy(masked)
    mk.materialize_(dense)
    unfused_(dense).requires_grad_(False)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(dense).double()

    def nchw(x: Tensor) -> Tensor:
        y: Tensor = dense(x.contiguous())
        return y

    def nhwc(x: Tensor) -> Tensor:
        y: Tensor = last(channels_last(x))
        return y

    def ours() -> Provider:
        packed = copy.deepcopy(masked)
        mk.pack_model_(packed)
        packed.requires_grad_(False)

        def run(x: Tensor) -> Tensor:
            with mk.use_backend(backend):
                y: Tensor = packed(channels_last(x))
            return y

        return Provider(run)

    def bf16() -> Provider:
        short = copy.deepcopy(last).bfloat16()
        return Provider(
            lambda x: short(channels_last(x)),
            prepare=Tensor.bfloat16,
            lossy=BF16_NETWORK_ERROR,
        )

    def as_published() -> Provider:
        model = published(masked)
        return Provider(lambda x: model(channels_last(x)))

    return Problem(
        inputs,
        {
            "ours": ours,
            "eager NCHW": lambda: Provider(nchw),
            "eager channels_last": lambda: Provider(nhwc),
            "torch.compile NCHW": lambda: Provider(compiled(nchw, inputs[0])),
            "torch.compile channels_last": lambda: Provider(compiled(nhwc, inputs[0])),
            "frozen compile NCHW": lambda: Provider(compiled(nchw, inputs[0], frozen=True)),
            "frozen compile channels_last": lambda: Provider(
                compiled(nhwc, inputs[0], frozen=True)
            ),
            "bf16 channels_last": bf16,
            "published layer": as_published,
        },
        # Plain PyTorch in the layout of ours: its pooling sums in another order there.
        against_float64(nhwc, lambda x: exact(x.contiguous())),
        dense=(
            "eager NCHW",
            "eager channels_last",
            "torch.compile NCHW",
            "torch.compile channels_last",
            "frozen compile NCHW",
            "frozen compile channels_last",
        ),
        multiply_adds=multiply_adds(lambda: dense(inputs[0])),
    )


def multiply_adds(run: Callable[[], Any]) -> int:
    """Of all products and convolutions of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


CASES = (
    *(PackedNetwork(256, 8, batch) for batch in (1, 64)),
    *(PackedBlock(256, 64, part) for part in ("depthwise", "block")),
)
QUICK = CASES[:3]
TOY = (PackedNetwork(8, 1, 2), PackedBlock(8, 2, "depthwise"))
