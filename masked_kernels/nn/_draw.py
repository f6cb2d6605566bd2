"""Draws that depend on a seed alone."""

import numpy as np
import torch


def stream(seed: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, layer, purpose)."""
    entropy = np.random.SeedSequence([seed, index, *purpose.encode()])
    return torch.Generator().manual_seed(
        int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
    )
