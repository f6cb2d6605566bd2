"""Processes as torchrun starts, joins and stops them."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from .world import World

PARALLEL = ("none", "ddp", "fsdp")


class ProcessLost(ConnectionError):
    """The other processes of the job cannot be reached, or the job is being stopped."""


@contextmanager
def open_world(parallel: str, device: str, timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started, for the ``with`` block; or be one alone.

    Args:
        parallel: ``none``, ``ddp`` or ``fsdp``.
        device: of this process, see `own_device`. Gloo joins CPUs, NCCL GPUs.
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        ValueError: ``parallel`` is not how the process was started.
        ProcessLost: another process died, did not answer in time, or had this one stopped.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel: got {parallel!r}, expected one of {', '.join(PARALLEL)}")
    launched = dist.is_torchelastic_launched()
    if launched != (parallel != "none"):
        expected = "ddp or fsdp under torchrun" if launched else "none without torchrun"
        raise ValueError(f"parallel: got {parallel!r}, expected {expected}")
    if not launched:
        yield World()
        return
    from .processes import Replicas, Shards  # DTensor and FSDP take a second to import

    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield Replicas() if parallel == "ddp" else Shards()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, as it stops the others
        raise ProcessLost(
            f"process {dist.get_rank()} of {dist.get_world_size()}: another process is gone, or "
            f"did not answer in {timeout:.0f} s ({_reason(error)})"
        ) from error
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the place in Gloo's source."""
    return str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]


def own_device(device: str) -> str:
    """Return ``device``, numbered for this process of those that torchrun started on a machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def leave(code: int) -> NoReturn:
    """``sys.exit(code)``, but a process that torchrun started ends without Python's teardown.

    DTensor's caches keep the process group, and with it Gloo's threads, alive until then. One that
    lets go of a tensor while Python ends aborts the process (PyTorch 2.13; seen in 1 job of 30).
    """
    if not dist.is_torchelastic_launched():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise ProcessLost(
        f"process {dist.get_rank()} of {dist.get_world_size()}: stopped by signal {number}, as "
        "torchrun does when another process has failed"
    )
