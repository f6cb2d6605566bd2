"""Checkpoints that a kill cannot damage, and that load without running code from the file."""

import io
import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have ``write`` fill a file and put it at ``path`` in one step.

    Whoever reads ``path``, even after a crash or a power cut, finds the old or the new content.
    """
    partial = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(path: Path) -> None:
    """Remove what a kill in the middle of `write_atomically` left beside ``path``."""
    for partial in path.parent.glob(f"{_partial_prefix(path)}*"):
        partial.unlink(missing_ok=True)


def _partial_prefix(path: Path) -> str:
    return f".{path.name}."


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them to ``path``, atomically."""
    # In memory first: interrupted, torch.save leaves a writer behind that ends the process if its
    # file is closed when it comes to write the rest.
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; refuses anything but what `save_checkpoint` writes.

    Raises:
        ValueError: the file is cut off or altered.
        pickle.UnpicklingError: it holds code, which is not run.
    """
    with path.open("rb") as file:
        damage = _damage(file)
    if damage is not None:
        raise ValueError(
            f"{path} is not a whole checkpoint ({path.stat().st_size:,} bytes): {damage}. Nothing "
            "was changed; put back a copy, or remove it to train from the start"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _damage(file: IO[bytes]) -> str | None:
    """Say what is wrong with the archive; torch.load looks at no checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
    except Exception as error:  # of many kinds, by which byte is wrong
        return str(error) or type(error).__name__
    return None if altered is None else f"the checksum of {altered} is wrong"
