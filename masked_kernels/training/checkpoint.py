"""Checkpoints that a kill cannot damage, and that load without running code from the file."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have ``write`` fill a file and put it at ``path`` in one step.

    Whoever reads ``path``, even after a crash or a power cut, finds the old or the new content.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them to ``path``, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; refuses anything but what `save_checkpoint` writes."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def random_state() -> dict[str, Any]:
    """Return the states of torch's global generators, which dropout layers draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    cpu: Tensor = state["cpu"]
    torch.set_rng_state(cpu)
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
