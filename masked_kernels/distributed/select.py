"""Exact masks of scores whose rows lie on the ranks of a process group, in the order of ranks.

Threshold and N:M look at one row at a time. Top-k ranks a whole tensor: its threshold is found by a
radix search over integer keys, 11 bits a pass, in which the ranks add up histograms. No rank sees
another's scores; what is gathered is bits, a 32nd of them. All layers share the collectives, which
are six however many the layers (nine for float64).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _ops
from .._checks import check_float
from ..backends import AUTO
from ..mask import matrix_shape
from ..rules import NM, Rule, Threshold, TopK

Group = dist.ProcessGroup | None
"""None for all processes."""

DIGIT = 11
"""Bits a pass of the radix search, hence 2048 counts a layer to add up."""


def select_rows(
    scores: Sequence[Tensor], rules: Sequence[Rule], group: Group = None
) -> list[Tensor]:
    """The whole mask of every layer, on every rank; bit for bit ``rule.select(whole scores)``.

    A collective: all ranks of the group call it with the same layers in the same order.

    Args:
        scores: this rank's rows of each layer, ``[rows, ...]`` float. Their number may differ from
            rank to rank and be 0; the other dimensions and the dtype may not.
        rules: of each layer: TopK, Threshold or NM.
        group: None for all processes.

    Returns:
        Words int32 ``[rows of all ranks, ceil(cols / 32)]`` of each layer. Raises ``ValueError`` on
        every rank if a score is NaN on any.
    """
    for i, (shard, rule) in enumerate(zip(scores, rules, strict=True)):
        check_float(f"scores[{i}]", shard)
        if shard.dim() < 2:
            raise ValueError(f"scores[{i}]: got shape {tuple(shard.shape)}, expected (rows, ...)")
        if type(rule) not in (TopK, Threshold, NM):
            got = type(rule).__name__
            raise TypeError(f"rules[{i}]: got {got}, expected TopK, Threshold or NM")
    if not scores:
        return []
    shards = [shard.detach().reshape(matrix_shape(shard.shape)) for shard in scores]
    rows = _rows_of_ranks(shards, group)
    words: dict[int, Tensor] = {
        i: rule.select(shards[i]) for i, rule in enumerate(rules) if not isinstance(rule, TopK)
    }
    for bits in (32, 64):
        layers = {
            i: rule
            for i, rule in enumerate(rules)
            if isinstance(rule, TopK) and _key_bits(shards[i]) == bits
        }
        drops = [r.drop(int(rows[:, i].sum()) * shards[i].shape[1]) for i, r in layers.items()]
        keys = [_keys(shards[i], rule.absolute) for i, rule in layers.items()]
        for i, kept in zip(layers, _all_but_smallest(keys, drops, bits, group), strict=True):
            words[i] = _ops.pack(kept.view(shards[i].shape), AUTO)
    return _whole([words[i] for i in range(len(shards))], rows, group)


def _rows_of_ranks(shards: list[Tensor], group: Group) -> Tensor:
    """Rows int64 ``[ranks, layers]``, on the CPU; raises on every rank if any has a NaN."""
    device = shards[0].device
    lengths = torch.tensor([len(s) for s in shards], device=device)
    # The maximum is NaN if anything is, and makes no tensor of the shard's size.
    nans = torch.stack([s.amax().isnan() if s.numel() else lengths.new_zeros(()) for s in shards])
    rows, has_nan = torch.stack(_all_gather(torch.stack([lengths, nans]), group)).cpu().unbind(1)
    for rank, layer in has_nan.nonzero().tolist():
        own = torch.cat([shards[layer].isnan().flatten(), nans.new_ones(1)]).int().argmax()
        index = (
            int(_all_gather(own, group)[rank]) + rows[:rank, layer].sum() * shards[layer].shape[1]
        )
        raise ValueError(
            f"scores[{layer}]: NaN at flat index {int(index)}, on rank {rank}; scores must not "
            "contain NaN"
        )
    return rows


def _key_bits(shard: Tensor) -> int:
    return 64 if shard.dtype == torch.float64 else 32


def _keys(shard: Tensor, absolute: bool) -> Tensor:
    """Integers ``[numel]`` in the order of the scores, equal for equal ones (0.0 and -0.0)."""
    wide = shard if shard.dtype == torch.float64 else shard.float()
    bits = (wide.flatten() + 0.0).view(torch.int64 if _key_bits(shard) == 64 else torch.int32)
    without_sign = torch.iinfo(bits.dtype).max
    if absolute:
        return bits.bitwise_and_(without_sign)
    return bits.bitwise_xor_((bits >> (_key_bits(shard) - 1)).bitwise_and_(without_sign))


def _all_but_smallest(
    keys: list[Tensor], drops: list[int], bits: int, group: Group
) -> list[Tensor]:
    """False at the ``drop`` smallest of all ranks' keys, layer by layer, else True.

    Among equal keys those of a lower rank go first, then those of a lower index.
    """
    if not keys:
        return []
    device = keys[0].device
    left = torch.tensor(drops, device=device)  # to drop among the candidates, [layers]
    bound = torch.zeros_like(left)  # the bits found so far of the smallest key that stays
    candidates = keys
    top = bits
    for shift in [*range(bits - DIGIT, 0, -DIGIT), 0]:
        # An arithmetic shift leaves the sign to the first digit, which is thus centred on 0.
        offset = 1 << (top - shift - 1) if top == bits else 0
        last = (1 << (top - shift)) - 1
        digits = [(k >> shift).add_(offset).bitwise_and_(last) for k in candidates]
        counts = torch.stack([d.bincount(minlength=1 << DIGIT) for d in digits])
        dist.all_reduce(counts, group=group)
        through = counts.cumsum(1)
        digit = torch.searchsorted(through, left.unsqueeze(1), right=True)
        digit.clamp_(max=last)  # where all is dropped no digit stays
        left -= (through - counts).gather(1, digit).squeeze(1)
        digit = digit.squeeze(1)
        bound += (digit - offset) << shift
        candidates = [k[d == kept] for k, d, kept in zip(candidates, digits, digit, strict=True)]
        top = shift
    equals = torch.tensor([len(c) for c in candidates], device=device)
    before = torch.stack(_all_gather(equals, group)).cumsum(0)[dist.get_rank(group)] - equals
    own_drops = (left - before).clamp(min=0).minimum(equals)
    return [_above(*layer) for layer in zip(keys, bound, own_drops, strict=True)]


def _above(keys: Tensor, bound: Tensor, drop: Tensor) -> Tensor:
    """True at keys over ``bound``, and at those equal to it but for the first ``drop``."""
    kept = keys > bound
    kept[(keys == bound).nonzero().flatten()[int(drop) :]] = True
    return kept


def _whole(words: list[Tensor], rows: Tensor, group: Group) -> list[Tensor]:
    """The rows of all ranks, of each layer, by one gather for all."""
    flat = torch.cat([w.flatten() for w in words])
    widths = [w.shape[1] for w in words]
    sizes = rows * torch.tensor(widths, device="cpu")  # [ranks, layers]
    padded = flat.new_zeros(int(sizes.sum(1).max()))
    padded[: len(flat)] = flat
    gathered = [
        part[: sum(of_rank)].split(of_rank)
        for part, of_rank in zip(_all_gather(padded, group), sizes.tolist(), strict=True)
    ]
    totals = rows.sum(0).tolist()
    return [
        torch.cat(parts).view(total, width)
        for total, width, parts in zip(totals, widths, zip(*gathered, strict=True), strict=True)
    ]


def _all_gather(t: Tensor, group: Group) -> list[Tensor]:
    """``t`` of every rank, in their order; all of one shape."""
    gathered = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, t, group=group)
    return gathered
