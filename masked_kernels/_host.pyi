"""Torch-free helpers over NumPy arrays: packed bits to and from bytes, CPU features."""

import numpy as np
from numpy.typing import NDArray

def pack_bytes(words: NDArray[np.uint32], cols: int) -> bytes:
    """Bits of words [rows, ceil(cols/32)] as ceil(rows*cols/8) bytes.

    Least significant bit first, no row padding.
    """

def unpack_bytes(data: bytes, rows: int, cols: int) -> NDArray[np.uint32]:
    """The words [rows, ceil(cols/32)] that pack_bytes turned into data."""

def popcount(words: NDArray[np.uint32]) -> int:
    """Number of set bits in all words."""

def cpu_features() -> dict[str, bool]:
    """Instruction sets the kernels ask about, and whether this CPU has them."""

def isa() -> str:
    """The instruction set the kernels use now: "avx512", "avx2" or "scalar".

    MASKED_KERNELS_CPU_ISA forces one; ValueError if it is unknown or missing here.
    """

def build_info() -> dict[str, str]:
    """What this build was made with: torch, compiler, flags."""
