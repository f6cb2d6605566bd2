"""What density a pruned network of a given size has."""

from .._checks import check_fraction

SAVINGS = (0.90, 0.92, 0.94, 0.96)
"""The settings of PEMN's pruning baselines (section 4.3.2, supplement tables 5 and 6)."""


def density_at_saving(saving: float, index_cost: float = 2.0) -> float:
    """The density at which a sparse layer takes ``1 - saving`` of the dense layer's storage.

    A dense layer of p weights takes p floats; a sparse one takes a float and ``index_cost`` units
    for each weight it keeps, so that ``(1 + index_cost) * density = 1 - saving``. PEMN counts two
    units (section 4.3.1), under which 90 % of storage is saved when 96.7 % of the weights are
    pruned; its tables call the same setting ``pr0.9``. With ``index_cost=0`` the saving is that
    pruning rate.

    Args:
        saving: fraction of the dense storage saved, from 0 to 1.
        index_cost: units per kept weight beside its value, at least 0.
    """
    check_fraction("saving", saving)
    if not index_cost >= 0:
        raise ValueError(f"index_cost: got {index_cost}, expected at least 0")
    return (1 - saving) / (1 + index_cost)
