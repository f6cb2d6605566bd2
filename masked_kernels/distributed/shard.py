"""Masked layers whose scores are sharded by rows over a mesh of processes."""

import itertools
import math
import weakref
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .._checks import check_type
from ..mask import PackedMask
from ..nn import MaskedConv2d, MaskedLinear
from ..nn._layer import FrozenLayer
from ..rules import Rule, Selected
from .replicate import broadcast_model_
from .select import select_rows


def shard_model_(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """FSDP2 for a masked model, in place: ``shard_scores_`` for the scores, ``fully_shard`` for
    whatever else is trained (norms, biases, layers left unmasked).

    Frozen values, dense or prototype, stay whole on every rank. All ranks start from what rank 0
    has. Make the optimizer afterwards.

    Args:
        model: on the mesh's device; one without masked layers is left to ``fully_shard``.
        mesh: of one dimension; None for all processes.
        options: of ``fully_shard`` of the model. For mixed precision use ``torch.autocast``
            rather than ``mp_policy``, which knows nothing of frozen values.
    """
    mesh = _mesh_of(model, mesh)
    broadcast_model_(model, mesh.get_group())
    if any(type(module) in _SHARDED for module in model.modules()):
        shard_scores_(model, mesh)
    scores = {id(layer.scores) for layer in _sharded_layers(model)}
    ignored = {p for p in model.parameters() if not p.requires_grad or id(p) in scores}
    for parameter in set(model.parameters()) - ignored:
        parameter.data = parameter.data.contiguous()  # fully_shard takes no channels_last
    fully_shard(model, mesh=mesh, ignored_params=ignored, **options)


def shard_scores_(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Leave each process the scores of some rows of every masked layer, and the bits of all.

    ``scores`` becomes a parameter of type DTensor, sharded by rows, with rank 0's values. Its
    gradient is the mean of the ranks' gradients, and so an optimizer's state is sharded too.

    The masks are chosen here, after every step of any optimizer that has scores of the model, and
    after ``load_state_dict``; all of these are thus collectives. After any other change of the
    scores call ``select_masks_``. A forward takes part in no collective.

    Args:
        model: with masked layers, at least one.
        mesh: of one dimension; None for all processes.
    """
    mesh = _mesh_of(model, mesh)
    layers = [module for module in model.modules() if type(module) in _SHARDED]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without MaskedLinear or MaskedConv2d, expected some"
        )
    sharded: dict[nn.Parameter, nn.Parameter] = {}  # scores may be shared
    for layer in layers:
        assert isinstance(layer, MaskedLinear | MaskedConv2d)
        whole = layer.scores
        if whole not in sharded:
            rows = distribute_tensor(whole.detach().contiguous(), mesh, [Shard(0)])
            sharded[whole] = nn.Parameter(rows, requires_grad=whole.requires_grad)
        layer.scores = sharded[whole]
        layer.register_buffer("words", None, persistent=False)
        layer.__class__ = _SHARDED[type(layer)]
    select_masks_(model)
    model.register_load_state_dict_post_hook(lambda module, _: select_masks_(module))
    _select_after_steps(model)


def select_masks_(model: nn.Module) -> None:
    """Choose the masks of all layers by the scores as they are now; a collective.

    Raises ``ValueError`` on every rank if a score is NaN on any.
    """
    layers = _sharded_layers(model)
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without sharded scores, expected shard_scores_ "
            "before"
        )
    words = select_rows(
        [layer.scores.to_local() for layer in layers],
        [layer.rule for layer in layers],
        layers[0].scores.device_mesh.get_group(),
    )
    for layer, chosen in zip(layers, words, strict=True):
        layer.words = chosen


class _ShardedLayer(FrozenLayer):
    """A masked layer of which this process has the scores of some rows and the bits of all."""

    scores: DTensor
    rule: Rule
    words: Tensor
    holds_all_scores = False

    @property
    def mask(self) -> PackedMask:
        """The mask that ``select_masks_`` chose last."""
        return PackedMask(self.words, self.weight_shape)

    def smallest_kept(self) -> float | None:
        """As without shards; a collective."""
        bits = distribute_tensor(
            self.mask.unpack(), self.scores.device_mesh, [Shard(0)], src_data_rank=None
        )
        scores = self.scores.to_local().detach()
        kept = (scores.abs() if self.rule.absolute else scores)[bits.to_local()]
        smallest = kept.amin() if len(kept) else kept.new_full((), math.inf)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, self.scores.device_mesh.get_group())
        return smallest.item() if self.mask.count() else None

    def scores_and_rule(self) -> tuple[Tensor, Rule]:
        scores: Tensor = _WholeScores.apply(self.scores, self.rule.absolute)  # type: ignore[no-untyped-call]
        # The sign in the gradient is the affair of the shards.
        return scores, Selected(self.rule, self.words, absolute=False)


class ShardedLinear(_ShardedLayer, MaskedLinear):  # type: ignore[misc]
    """What ``shard_scores_`` makes of a MaskedLinear."""


class ShardedConv2d(_ShardedLayer, MaskedConv2d):  # type: ignore[misc]
    """What ``shard_scores_`` makes of a MaskedConv2d."""


_SHARDED: dict[type, type] = {MaskedLinear: ShardedLinear, MaskedConv2d: ShardedConv2d}


class _WholeScores(Function):
    """A stand-in of the whole scores' shape, without memory: a forward needs the bits alone.

    Its gradient is averaged over the ranks, each keeping its rows, and ⊙ sign(scores) there if the
    rule ranks |score|.
    """

    @staticmethod
    def forward(ctx: Any, scores: DTensor, absolute: bool) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.absolute = absolute
        return scores.to_local().new_zeros(()).expand(scores.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (scores,) = ctx.saved_tensors
        of_ranks = DTensor.from_local(grad, scores.device_mesh, [Partial("avg")], run_check=False)
        own = of_ranks.redistribute(placements=scores.placements)
        return own * scores.sign() if ctx.absolute else own, None


def _mesh_of(model: nn.Module, mesh: DeviceMesh | None) -> DeviceMesh:
    if mesh is None:
        device = next(itertools.chain(model.parameters(), model.buffers())).device
        return init_device_mesh(device.type, (dist.get_world_size(),))
    check_type("mesh", mesh, DeviceMesh)
    if mesh.ndim != 1:
        raise ValueError(f"mesh: got {mesh.ndim} dimensions, expected 1: rows are sharded over all")
    return mesh


def _sharded_layers(model: nn.Module) -> list[_ShardedLayer]:
    return [module for module in model.modules() if isinstance(module, _ShardedLayer)]


def _select_after_steps(model: nn.Module) -> None:
    """Hook all optimizers, those yet to be made too: one forgotten would train stale masks."""
    reference = weakref.ref(model)

    def after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        stepped = reference()
        if stepped is None:
            return
        scores = {id(layer.scores) for layer in _sharded_layers(stepped)}
        trained = (p for group in optimizer.param_groups for p in group["params"])
        if any(id(p) in scores for p in trained):
            select_masks_(stepped)

    handle = register_optimizer_step_post_hook(after_step)
    weakref.finalize(model, handle.remove)
