"""Training steps of PEMN's networks on a GPU in bfloat16 autocast: time, and peak of memory."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .nets import (
    CLASSES,
    IMAGE,
    RECIPES,
    RECOMPUTED,
    Net,
    build,
    masked_weights,
    training_step,
    ways,
)

ROUNDS = 8


def make_step(net: Net, way: str, device: str, backend: str, batch: int) -> Callable[[], Tensor]:
    """A function that takes one step and returns the loss."""
    model = build(net, way, device)
    images = torch.randn(batch, *IMAGE, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    named = backend if way in RECIPES else "auto"
    step = training_step(model, labels, named, torch.bfloat16, recompute=way == RECOMPUTED)
    return functools.partial(step, images)


def measure(net: Net, device: str = "cuda", backend: str = "triton") -> dict[str, Any]:
    """By way to build the network: milliseconds of a step, ways in turns, launched by the host and
    as a CUDA graph, and the peak of what is allocated, model included; or the reason why there are
    none. A way that waits for the host has no graph.
    """
    result: dict[str, Any] = {}
    steps: dict[str, Callable[[], Tensor]] = {}
    weights = masked_weights(net)
    for way in ways(net, device):
        try:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            step = make_step(net, way, device, backend, net.batch)
            for _ in range(3):
                step()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            result[way] = {"peak_bytes": peak, "peak_bytes_per_weight": peak / weights}
            steps[way] = step
        except Exception as error:  # one way must not cost the others
            result[way] = {"error": f"{type(error).__name__}: {error}"[:500]}
    for way, milliseconds in _medians(steps).items():
        result[way]["median"] = milliseconds
    for way, milliseconds in _medians(_graphs(steps)).items():
        result[way]["graph"] = milliseconds
    return result


def _medians(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            taken[way].append(1e3 * (time.perf_counter() - begin))
    return {way: round(float(np.median(samples)), 3) for way, samples in taken.items()}


def _graphs(steps: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], object]]:
    """Each step as a CUDA graph, those that can be captured. One memory serves all of them."""
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, Callable[[], object]] = {}
    for way, step in steps.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                step()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=pool):
                step()
        except RuntimeError:
            torch.cuda.synchronize()
            continue
        graphs[way] = graph.replay
    return graphs
