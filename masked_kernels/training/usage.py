"""How much memory a run took."""

import resource
import sys

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start counting anew, where that is possible: on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return bytes: on CUDA the most that tensors held since the reset; else the most that this
    process has had in memory since it began, interpreter and libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
