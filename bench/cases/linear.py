"""Linear layers with a fixed mask."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_kernels as mk

from ..problem import Case, Problem, Provider, against_float64
from ..providers import BF16_ERROR, CSR_ERROR, INT8_ERROR, compiled, csr, int8_linear, linear_layer
from ._weights import masked_weight, values_name

ROTATION = 4
MOST_WORK_OF_CSR = 1 << 29
"""Multiply-adds; beyond, a call takes most of a second and says nothing new."""
MOST_WORK_OF_REFERENCE = 1 << 22


@dataclass(frozen=True)
class MaskedLinear(Case):
    """``x [batch, k]`` times a masked ``[n, k]``, float32.

    The weight repeats a prototype of the ratio's period, the paper's or the aligned one, or is
    dense if ratio is None; the mask is then fixed in a packed layer, as inference has it, which
    keeps only what the mask keeps if ``compact``.
    """

    n: int
    k: int
    batch: int
    ratio: float | None = 1e-2
    align: bool = False
    layer: str = ""
    compact: bool = False
    group: ClassVar[str] = "masked_linear"

    @property
    def name(self) -> str:
        values = values_name(self.ratio, self.align) + (" compact" if self.compact else "")
        layer = f" ({self.layer})" if self.layer else ""
        return f"masked_linear {self.n}x{self.k} {values} batch={self.batch}{layer}"

    def build(self, backend: str) -> Problem:
        n, k, batch = self.n, self.k, self.batch
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(torch.randn(batch, k, generator=generator) for _ in range(ROTATION))
        w = masked_weight((n, k), self.ratio, self.align)
        weight, masked, bits = w.weight, w.masked, w.float_mask
        x_and_y = batch * (n + k)

        def product(matrix: Tensor, element: int = 4, **settings: object) -> Provider:
            moved = element * (matrix.numel() + x_and_y)
            return Provider(lambda x: F.linear(x, matrix), moved=moved, **settings)

        def ours() -> Provider:
            kept = w.mask.count() if self.compact else n * k
            moved = w.packed_bytes - 4 * (n * k - kept) + 4 * x_and_y
            if self.ratio is not None:
                return Provider(
                    lambda x: mk.masked_linear(x, w.values, w.mask, backend=backend), moved=moved
                )
            kind = mk.nn.CompactLinear if self.compact else mk.nn.PackedLinear
            packed = kind(k, n, weight=w.values, mask=w.mask)

            def run(x: Tensor) -> Tensor:
                with mk.use_backend(backend):
                    y: Tensor = packed(x)
                return y

            return Provider(run, moved=moved)

        def sparse() -> Provider:
            nonzeros = csr(masked)
            return Provider(
                lambda x: (nonzeros @ x.t()).t(),
                moved=8 * nonzeros.values().numel() + 4 * x_and_y,
                largest_error=CSR_ERROR,
            )

        def int8() -> Provider:
            layer = int8_linear(masked)
            return Provider(layer, moved=masked.numel() + 4 * x_and_y, lossy=INT8_ERROR)

        providers = {
            "ours": ours,
            "F.linear": lambda: product(masked),
            "torch.compile": lambda: Provider(
                compiled(linear_layer(masked), inputs[0], frozen=True),
                moved=4 * (n * k + x_and_y),
            ),
            "F.linear(x, w * m)": lambda: Provider(
                lambda x: F.linear(x, weight * bits), moved=4 * (4 * n * k + x_and_y)
            ),
            "bf16": lambda: product(
                masked.bfloat16(), 2, prepare=Tensor.bfloat16, lossy=BF16_ERROR
            ),
            "int8": int8,
        }
        if n * k * batch <= MOST_WORK_OF_CSR:
            providers["CSR"] = sparse
        if n * k * batch <= MOST_WORK_OF_REFERENCE and backend != "reference":
            providers["reference"] = lambda: Provider(
                lambda x: mk.masked_linear(x, w.values, w.mask, backend="reference")
            )
        return Problem(
            inputs,
            providers,
            against_float64(lambda x: F.linear(x, masked), lambda x: F.linear(x, masked.double())),
            dense=("F.linear", "torch.compile"),
            multiply_adds=n * k * batch,
        )


SQUARES = (512, 1024, 4096, 8192)
BATCHES = (1, 8, 64, 512)
IMAGES = 64
VIT_TOKENS = 65 * IMAGES  # 8 x 8 patches and the class token
SHORT = 1e-4
"""A ratio whose aligned period is a row or less: every row of the weight reads the same values."""

CASES = (
    *(MaskedLinear(n, n, b, SHORT, align=True) for n in SQUARES for b in BATCHES),
    *(MaskedLinear(11008, 4096, b, SHORT, align=True) for b in BATCHES),
    *(MaskedLinear(1536, 512, t, SHORT, True, "ViT-512 qkv") for t in (65, VIT_TOKENS)),
    *(MaskedLinear(512, 512, t, SHORT, True, "ViT-512 mlp") for t in (65, VIT_TOKENS)),
    *(MaskedLinear(4096, 4096, b, align=True) for b in BATCHES),
    *(MaskedLinear(n, n, b) for n in SQUARES[:3] for b in BATCHES),
    *(MaskedLinear(n, k, b) for n, k in ((11008, 4096), (8192, 8192)) for b in (1, 8, 64)),
    MaskedLinear(1536, 512, VIT_TOKENS, layer="ViT-512 qkv"),
    *(MaskedLinear(n, n, b, ratio=None) for n in (1024, 4096) for b in (1, 8, 64)),
    *(MaskedLinear(n, n, b, ratio=None, compact=True) for n in (1024, 4096) for b in (1, 8, 64)),
)
"""Layers of ViT-512 and of language models, and squares. Cases of one weight stand together."""

QUICK = (
    *(MaskedLinear(n, n, b, SHORT, align=True) for n in (512, 4096) for b in (1, 64)),
    MaskedLinear(1536, 512, 65, SHORT, True, "ViT-512 qkv"),
    *(MaskedLinear(n, n, b) for n in (512, 4096) for b in (1, 64)),
    *(MaskedLinear(1024, 1024, b, ratio=None) for b in (1, 64)),
)

TOY = (
    MaskedLinear(33, 65, 3),
    MaskedLinear(64, 64, 3, 1e-2, align=True, layer="toy"),
    MaskedLinear(16, 40, 2, ratio=None),
    MaskedLinear(16, 40, 2, ratio=None, compact=True),
)
