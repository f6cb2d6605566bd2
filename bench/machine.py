"""The machine block of a result: where, with what and from which source numbers come."""

import datetime
import subprocess
from pathlib import Path
from typing import Any

import torch

from masked_kernels import info

ROOT = Path(__file__).parent.parent


def machine(command: str) -> dict[str, Any]:
    """JSON-able. ``commit`` is None outside git; ``dirty`` says that tracked files differ."""
    cpu = info.cpu()
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": cpu["model"],
        "cores": cpu["cores"],
        "threads": torch.get_num_threads(),
        "isa": cpu["isa"],
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
