"""The settings of a device: those measured on a GPU of its name, else those derived for its
architecture, from ``gpus.json``.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

from . import interpreted
from .config import Settings

GPUS = Path(__file__).with_name("gpus.json")
"""Fields of ``Settings`` by architecture, derived from data sheets and compiled code, and by the
name of a GPU that ``python -m bench tune --backend triton`` has measured.
"""

_forced: Settings | None = None


def settings_of(t: Tensor) -> Settings:
    """Of the device of ``t``; in the interpreter the default."""
    if _forced is not None:
        return _forced
    if interpreted():
        return Settings()
    return settings_of_gpu(_name(t.device) if t.is_cuda else "", architecture(t))


@contextlib.contextmanager
def use_settings(settings: Settings) -> Iterator[None]:
    """For all devices: how the tuning times what would not be chosen."""
    global _forced
    previous, _forced = _forced, settings
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def settings_of_gpu(name: str, architecture: str) -> Settings:
    """Of the GPU if it was measured, else of its architecture or the closest older one."""
    table = json.loads(GPUS.read_text())
    if name not in table and architecture.startswith("sm_"):
        number = int(architecture.removeprefix("sm_"))
        older = [n for n in _numbers(table) if n <= number]
        architecture = f"sm_{max(older, default=0)}"
    return Settings.from_dict(table.get(name) or table.get(architecture) or {})


def _numbers(table: dict[str, object]) -> list[int]:
    return [int(key.removeprefix("sm_")) for key in table if key.startswith("sm_")]


def architecture(t: Tensor) -> str:
    """``sm_90`` or ``gfx942``; of the device of ``t``, or of what kernels are compiled for."""
    if t.is_cuda:
        return _architecture(t.device)
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@functools.cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
