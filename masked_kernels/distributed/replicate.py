"""Whole copies of a model on every rank, and what keeps them equal."""

import inspect
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .select import Group


def replicate(model: nn.Module, group: Group = None) -> DistributedDataParallel:
    """DDP for a masked model: equal scores, hence equal masks, on every rank.

    All ranks start from what rank 0 has. After that nothing frozen travels, prototypes included,
    and no buffer either: BatchNorm normalises by its rank's own images, and its running statistics
    stay each rank's own until ``average_running_statistics_``.

    Args:
        model: on this rank's device.
        group: None for all processes.
    """
    broadcast_model_(model, group)
    # torch 2.13 renames the option, and says that the old one also leaves buffers unequal at first.
    known = inspect.signature(DistributedDataParallel).parameters
    option = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
    options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, process_group=group, **options)


@torch.no_grad()
def broadcast_model_(model: nn.Module, group: Group = None) -> None:
    """Give every rank rank 0's parameters and buffers; what is sharded already stays."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor, group=group, group_src=0)


@torch.no_grad()
def average_running_statistics_(model: nn.Module, group: Group = None) -> None:
    """Replace the running means and variances of batch and instance norms by those of all ranks,
    averaged: do so before evaluating and before saving.
    """
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
    for tensor in statistics:
        dist.all_reduce(tensor, group=group)
        tensor /= dist.get_world_size(group)
