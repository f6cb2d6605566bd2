"""The machine block of a result: where, with what and from which source numbers come."""

import ctypes
import datetime
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from masked_kernels import info

ROOT = Path(__file__).parent.parent
GEMM_SIZE = 2048
STREAM_BYTES = 1 << 30
"""Far beyond the caches, those that machines share too."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_pages() -> bool:
    """Have malloc keep what is freed; whether it will, which glibc's can.

    It returns large blocks to the system at once, so the next tensor of that size starts with a
    page fault every 4 KB. In a virtual machine those took a third of a training step, at random.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, value) for option, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0))
    )


def machine(command: str, keeps_pages: bool = False) -> dict[str, Any]:
    """JSON-able. ``commit`` is None outside git; ``dirty`` says that tracked files differ;
    ``keeps_pages`` is what ``keep_pages`` returned.
    """
    cpu = info.cpu()
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": cpu["model"],
        "cores": cpu["cores"],
        "threads": torch.get_num_threads(),
        "isa": cpu["isa"],
        "torch": torch.__version__,
        "keeps_pages": keeps_pages,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def peaks(
    gemm_size: int = GEMM_SIZE, stream_bytes: int = STREAM_BYTES, seconds: float = 1.0
) -> dict[str, float]:
    """What the machine can do with torch's threads, each the best of ``seconds``.

    ``multiply_adds`` a second of a square float32 product, which the library runs at nearly the
    FMA units' rate, and ``bytes`` a second of memory, the better of summing and copying.
    """
    a, b = torch.randn(2, gemm_size, gemm_size)
    c = torch.empty_like(a)
    stream = torch.zeros(stream_bytes // 4)
    half = stream.numel() // 2
    return {
        "multiply_adds": gemm_size**3 / _fastest(lambda: torch.mm(a, b, out=c), seconds),
        "bytes": stream_bytes
        / min(
            _fastest(stream.sum, seconds / 2),
            _fastest(lambda: stream[:half].copy_(stream[half:]), seconds / 2),
        ),
    }


def _fastest(run: Callable[[], Any], seconds: float) -> float:
    run()
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
