"""Compile the Triton kernels of a call for a GPU that need not be there, and read their code.

``compiled(call, "sm_90")`` runs the Python side of ``call`` on CPU tensors of real sizes; each
launch compiles what it would run, with the specialisation that it would get, and runs nothing.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _AbsentDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # kernels cache what they compiled by device

    def get_current_stream(self, device: object) -> int:
        return 0


def compiled(call: Callable[[], object], target: str) -> list[CompiledKernel]:
    """The kernels that ``call`` would launch, in order, compiled for one of ``TARGETS``."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options.setdefault("enable_fp_fusion", True)  # Triton 3.9 warns if it is left open
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    with (
        mock.patch.object(driver, "_active", _AbsentDevice(TARGETS[target])),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        call()
    return kernels
