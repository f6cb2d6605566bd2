"""What masked_* and scored_* refuse, by an error that names the argument."""

import pytest
import torch

import masked_kernels as mk
from masked_kernels.backends import check_scores

X, W, MASK = torch.randn(2, 8), torch.randn(3, 8), torch.ones(3, 8, dtype=torch.bool)
IMAGE, KERNEL = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: mk.masked_linear([1.0], W, m), TypeError, "x: got list, expected Tensor"),
        (lambda m: mk.masked_linear(X.long(), W, m), TypeError, "x: got dtype torch.int64"),
        (
            lambda m: mk.masked_linear(X[:, :7], W, m),
            ValueError,
            r"x: got shape \(2, 7\), expected \(\.\.\., 8\)",
        ),
        (
            lambda m: mk.masked_linear(X, W[:2], m),
            ValueError,
            r"weight: got shape \(2, 8\), expected \(3, 8\)",
        ),
        (
            lambda m: mk.masked_linear(X, W.double(), m),
            TypeError,
            "weight: got dtype torch.float64, expected torch.float32 as x",
        ),
        (
            lambda m: mk.masked_linear(X, "w", m),
            TypeError,
            "weight: got str, expected Tensor or Prototype",
        ),
        (
            lambda m: mk.masked_linear(X, W, MASK),
            TypeError,
            "mask: got Tensor, expected PackedMask",
        ),
        (
            lambda m: mk.masked_linear(X, W, m, torch.zeros(4)),
            ValueError,
            r"bias: got shape \(4,\), expected \(3,\)",
        ),
        (
            lambda m: mk.masked_linear(X, W, m, scale=torch.ones(2)),
            ValueError,
            r"scale: got shape \(2,\)",
        ),
        (
            lambda m: mk.masked_linear(X, W, m, scale=torch.ones((), requires_grad=True)),
            ValueError,
            "scale: .* requires grad",
        ),
        (
            lambda m: mk.masked_linear(X.to("meta"), W, m),
            ValueError,
            "weight: got device cpu, expected meta as x",
        ),
        (
            lambda m: mk.masked_linear(X, W, m, backend="gpu"),
            ValueError,
            "backend: got 'gpu', expected one of auto",
        ),
        (
            lambda m: mk.scored_linear(X, W, W * torch.nan, mk.TopK()),
            ValueError,
            "scores: NaN at flat index 0",
        ),
        (
            lambda m: mk.scored_linear(X, W, MASK, mk.TopK()),
            TypeError,
            "scores: got dtype torch.bool",
        ),
        (lambda m: mk.scored_linear(X, W, W, 0.5), TypeError, "rule: got float, expected Rule"),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, KERNEL, mk.TopK(), groups=2),
            ValueError,
            "groups: got 2 with 4 channels",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE[0, 0], KERNEL, KERNEL, mk.TopK()),
            ValueError,
            r"x: got shape \(5, 5\)",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, W, mk.TopK()),
            ValueError,
            r"scores: got shape \(3, 8\), expected 4 dim",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, KERNEL, mk.TopK(), stride=0),
            ValueError,
            "stride: got 0",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, KERNEL, mk.TopK(), padding=(1, 2, 3)),
            ValueError,
            r"padding: got \(1, 2, 3\)",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, KERNEL, mk.TopK(), padding="full"),
            ValueError,
            "padding: got 'full'",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, KERNEL, mk.TopK(), padding="same", stride=2),
            ValueError,
            "expected stride 1",
        ),
        (
            lambda m: mk.scored_conv2d(IMAGE, KERNEL, KERNEL, mk.TopK(), dilation=3),
            ValueError,
            r"x: got spatial size \(5, 5\)",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(mk.PackedMask.from_bool(MASK))
        check_scores()
