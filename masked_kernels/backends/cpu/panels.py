"""``panel_linear``: values of any kind, decoded and multiplied a panel of rows at a time; as a
convolution over the patches of an image.
"""

from torch import Tensor

from ._native import as_float, native, optional_float
from .aligned import Geometry


def panel_linear(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry = (),
) -> Tensor:
    """For tokens x ``[M, K]``; with a geometry for the patches of images x ``[B, H, W, C]``."""
    y: Tensor = native().panel_linear(
        as_float(x),
        as_float(values),
        words.contiguous(),
        optional_float(bias),
        optional_float(scale),
        geometry,
    )
    return y


def panel_linear_fused_(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    words: Tensor,
    affine: Tensor,
    activation: str,
    residual: Tensor | None,
    geometry: Geometry = (),
) -> None:
    """Into y ``[..., N]``."""
    native().panel_linear_fused_(
        y, x, as_float(values), words.contiguous(), affine, activation, residual, geometry
    )
