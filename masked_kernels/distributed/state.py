"""State that moves between numbers of processes: whole tensors, whoever held which rows."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def gather_state(state: Any) -> Any:
    """``state`` with every DTensor in its dicts, lists and tuples whole: on rank 0, on the CPU.

    A collective. The other ranks get None in a DTensor's place. What comes out is what a single
    process would have made, and loads into any number of them.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor().detach()
        return whole.cpu() if state.device_mesh.get_local_rank() == 0 else None
    if isinstance(state, dict):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value) for value in state)
    return state


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``model.load_state_dict`` of whole tensors, each rank keeping its rows of what is sharded.

    A collective, for the masks are chosen anew; every rank gives the same state.
    """
    own = model.state_dict()
    model.load_state_dict({name: _rows_as(t, own.get(name)) for name, t in state.items()})


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors, each rank keeping its rows of the state of
    sharded parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        index: {
            key: _rows_as(value, params[index])
            if isinstance(value, Tensor) and value.shape == params[index].shape
            else value
            for key, value in slot.items()
        }
        for index, slot in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slots})


def _rows_as(whole: Tensor, like: Tensor | None) -> Tensor:
    """This rank's rows of ``whole``, which all ranks have, if ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
