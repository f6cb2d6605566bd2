"""Packed masks: packing, transposing, counting, decoding, and selection from scores."""

import torch
from torch import Tensor

from ._native import as_float, native


def pack(mask: Tensor) -> Tensor:
    words: Tensor = native().pack(mask.contiguous())
    return words


def unpack(words: Tensor, cols: int) -> Tensor:
    mask: Tensor = native().unpack(words.contiguous(), cols)
    return mask


def popcount(words: Tensor) -> Tensor:
    counts: Tensor = native().popcount(words.contiguous())
    return counts


def transpose(words: Tensor, cols: int) -> Tensor:
    transposed: Tensor = native().transpose(words.contiguous(), cols)
    return transposed


def select_topk(scores: Tensor, drop: int, absolute: bool) -> Tensor:
    return _selected(*native().select_topk(as_float(scores), drop, absolute))


def select_topk_many(scores: list[Tensor], drops: list[int], absolute: bool) -> list[Tensor]:
    words: list[Tensor]
    words, tensor, nan = native().select_topk_many([as_float(s) for s in scores], drops, absolute)
    _check_nan(f"scores[{tensor}]", nan)
    return words


def forget_thresholds() -> None:
    native().forget_thresholds()


def select_threshold(scores: Tensor, threshold: float) -> Tensor:
    # torch compares a tensor with a number in the dtype of the tensor.
    rounded = torch.tensor(threshold, dtype=scores.dtype).item()
    return _selected(*native().select_threshold(as_float(scores), rounded))


def select_nm(scores: Tensor, n: int, m: int, absolute: bool) -> Tensor:
    return _selected(*native().select_nm(as_float(scores), n, m, absolute))


def decode(values: Tensor, words: Tensor, cols: int) -> Tensor:
    out = values.new_empty((words.shape[0], cols))
    native().decode_(out, values.contiguous(), words.contiguous(), 0)
    return out


def _selected(words: Tensor, nan: int) -> Tensor:
    _check_nan("scores", nan)
    return words


def _check_nan(name: str, nan: int) -> None:
    if nan >= 0:
        raise ValueError(f"{name}: NaN at flat index {nan}; scores must not contain NaN")
