"""Training on several processes: what each holds, and what travels.

    replicate (DDP)      every rank: all scores, all values, all optimizer state
        a step           gradients of all that is trained, averaged by DDP; masks are then equal
                         because scores are
    shard_model_ (FSDP2) every rank: its rows of each layer's scores and of their optimizer state
                         (``scores``, a DTensor); the bits of all rows (``words``, a buffer); all
                         frozen values, dense or prototype; its part of norms, biases and unmasked
                         layers, which ``fully_shard`` keeps
        forward          reads bits and values alone, so no scores travel
        backward         a layer's score gradient is made whole, averaged and cut into rows (one
                         reduce-scatter), times sign(score) where the score is
        after a step     exact masks of all layers: ranks add up histograms of their keys, then
                         gather bits, 1/32 of the scores' bytes (``select_rows``)
    state                gathered whole on rank 0, loads into any number of processes

``import masked_kernels`` does not import it. Beside training in the order of imports, above nn.
"""

from .replicate import average_running_statistics_, broadcast_model_, replicate
from .select import select_rows
from .shard import ShardedConv2d, ShardedLinear, select_masks_, shard_model_, shard_scores_
from .state import gather_state, load_model_state, load_optimizer_state

__all__ = [
    "ShardedConv2d",
    "ShardedLinear",
    "average_running_statistics_",
    "broadcast_model_",
    "gather_state",
    "load_model_state",
    "load_optimizer_state",
    "replicate",
    "select_masks_",
    "select_rows",
    "shard_model_",
    "shard_scores_",
]
