"""What ``python -m masked_kernels info`` shows: versions, machine, backends, environment."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__, _ops
from .backends import ENVIRONMENT_VARIABLE, backends, why_not

ENVIRONMENT = {
    ENVIRONMENT_VARIABLE: "backend to use where a call names none",
    "MASKED_KERNELS_CPU_ISA": "instruction set of the CPU kernels: avx512, avx2 or scalar",
}
"""Environment variables that the package reads, and what each sets."""


def gather() -> dict[str, Any]:
    """All of it, JSON-able; ``backends`` maps each name to None or why it is unavailable."""
    return {
        "masked_kernels": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "numpy", "safetensors", "triton")},
        "platform": platform.platform(),
        "cpu": cpu(),
        "native": native(),
        "backends": backends(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def cpu() -> dict[str, Any]:
    """Model, cores, threads in use; without the native module ``isa`` and ``features`` are None."""
    facts: dict[str, Any] = {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "isa": None,
        "features": None,
    }
    if (host := _host()) is not None:
        try:
            facts["isa"] = host.isa()
        except ValueError as error:  # MASKED_KERNELS_CPU_ISA asks for one that is not here
            facts["isa"] = f"error: {error}"
        facts["features"] = [name for name, there in host.cpu_features().items() if there]
    return facts


def native() -> dict[str, str] | None:
    """How the native code was built, or None if it was not."""
    host = _host()
    return None if host is None else dict(host.build_info())


DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def support() -> dict[str, dict[str, list[str]]]:
    """For each op and each backend available here: the dtypes it runs in, asked of the backend."""
    available = [name for name, reason in backends().items() if reason is None]
    return {
        op: {
            name: [
                d for d, dtype in DTYPES.items() if why_not(name, op, *_sample(op, dtype)) is None
            ]
            for name in available
        }
        for op in _ops.NAMES
    }


def support_table() -> str:
    """``support`` as a Markdown table; "all" stands for every dtype."""
    facts = support()
    names = list(next(iter(facts.values())))
    lines = [f"| op | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for op, cells in facts.items():
        texts = ("all" if len(c) == len(DTYPES) else ", ".join(c) or "no" for c in cells.values())
        lines.append(f"| `{op}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def _sample(op: str, dtype: torch.dtype) -> list[Any]:
    """The smallest arguments of an op, by its schema, floats in ``dtype``."""
    made: dict[str, Any] = {"int": 1, "SymInt": 1, "bool": True, "float": 0.0}
    arguments: list[Any] = []
    for argument in getattr(torch.ops.masked_kernels, op).default._schema.arguments[:-1]:
        kind = str(argument.real_type)
        if kind == "Tensor":
            shape = (1, 1, 1, 1) if "conv2d" in op and argument.name != "words" else (1, 1)
            packed = {"words": torch.int32, "mask": torch.bool}
            arguments.append(torch.zeros(shape, dtype=packed.get(argument.name, dtype)))
        elif kind == "List[Tensor]":
            arguments.append([torch.zeros((1, 1), dtype=dtype)] * 2)
        elif kind.startswith("List"):
            arguments.append([1, 1])
        else:
            arguments.append(made.get(kind))
    return arguments


def _host() -> Any:
    if importlib.util.find_spec(f"{__package__}._host") is None:
        return None
    return importlib.import_module(f"{__package__}._host")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The processor's name; Linux keeps it where ``platform`` does not look."""
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
