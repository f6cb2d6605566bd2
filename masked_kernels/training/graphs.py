"""What a step does with a batch as CUDA graphs: hundreds of launches become one."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_EAGER = 2
"""Batches of a size that run as they are: kernels are compiled first, libraries choose theirs."""


@dataclass(frozen=True)
class _Captured:
    """A graph, the memory that it reads, and the gradients that it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    labels: Tensor
    grads: tuple[Tensor | None, ...]


class CudaGraphs:
    """``run`` on batches on a CUDA device; the third batch of a size is captured, and that graph
    serves all later ones. What comes out is the same.

    Args:
        run: takes images, labels and their number and leaves gradients, where there were none
            before. It must not wait for the device, and what else it changes must stay where it is.
        parameters: what it leaves gradients of.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor, int], None], parameters: Iterable[nn.Parameter]
    ) -> None:
        self.run, self.parameters = run, tuple(parameters)
        self.seen: Counter[torch.Size] = Counter()
        self.captured: dict[torch.Size, _Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, inputs: Tensor, labels: Tensor, count: int) -> None:
        size = inputs.shape
        self.seen[size] += 1
        if self.seen[size] <= _EAGER:
            self.run(inputs, labels, count)
            return
        if size not in self.captured:
            self.captured[size] = self._capture(inputs, labels, count)
        captured = self.captured[size]
        captured.inputs.copy_(inputs)
        captured.labels.copy_(labels)
        captured.graph.replay()
        for parameter, grad in zip(self.parameters, captured.grads, strict=True):
            parameter.grad = grad

    def _capture(self, inputs: Tensor, labels: Tensor, count: int) -> _Captured:
        """Record ``run``, which computes nothing yet. One memory serves the graphs of all sizes, as
        what one leaves is used up before the next one runs.
        """
        graph, inputs, labels = torch.cuda.CUDAGraph(), inputs.clone(), labels.clone()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self.pool):
            self.run(inputs, labels, count)
        return _Captured(graph, inputs, labels, tuple(p.grad for p in self.parameters))
