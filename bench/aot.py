"""Compile the Triton kernels of a call for a GPU that need not be there, and read their code.

``compiled(call, "sm_90")`` runs the Python side of ``call`` on CPU tensors of real sizes; each
launch compiles what it would run, with the specialisation that it would get, and runs nothing.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
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

SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Memory that a program can have; sm_89 has the least and runs what is made for sm_80."""


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

    hip = "ahead of time" if TARGETS[target].backend == "hip" else None
    with (
        mock.patch.object(driver, "_active", _AbsentDevice(TARGETS[target])),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.version, "hip", hip),
    ):
        call()
    return kernels


@dataclass(frozen=True)
class Code:
    """What a kernel became: opcodes of its longest loop, if there are such of the longest with a
    matrix product, and resources.
    """

    loop: list[str]
    registers: int
    stack: int  # bytes; more than none means that registers spill


def code(kernel: CompiledKernel) -> Code:
    """Read the SASS of a kernel that was compiled for CUDA, by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (_cuobjdump(flag, file.name) for flag in ("-sass", "-res-usage"))
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    instructions = [(int(address, 16), text) for address, text in found]
    loops = []
    for end, text in instructions:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and (start := int(jump[1], 16)) < end:
            loops.append([_opcode(t) for address, t in instructions if start <= address <= end])
    with_product = [loop for loop in loops if any("MMA" in opcode for opcode in loop)]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Code(max(with_product or loops, key=len, default=[]), int(registers), int(stack))


def _opcode(text: str) -> str:
    """``@!P0 LDG.E.128 R4, [R2]`` is an LDG."""
    return re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0]


def _cuobjdump(flag: str, path: str) -> str:
    done = subprocess.run(
        [knobs.nvidia.cuobjdump.path, flag, path], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr
