"""What kernels read in place of a mask's words, kept while these live: laying it out costs as much
as a product with one token.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

_kept: dict[int, tuple[weakref.ref[Tensor], int, dict[Hashable, Any]]] = {}
"""By id: the tensor, its version, and what was made of it by layout.

A plain dictionary, because a look-up in ``WeakTensorKeyDictionary`` takes as long as a small layer.
"""


def relaid(source: Tensor, layout: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned before for this tensor, unchanged, in this layout."""
    if source.is_inference():  # has no version, so a change would go unseen
        return make()
    key = id(source)
    kept = _kept.get(key)
    if kept is None or kept[0]() is not source or kept[1] != source._version:
        forget = weakref.ref(source, lambda _: _kept.pop(key, None))
        _kept[key] = kept = (forget, source._version, {})
    layouts = kept[2]
    if layout not in layouts:
        layouts[layout] = make()
    laid: T = layouts[layout]
    return laid
