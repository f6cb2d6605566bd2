"""Registration: schema, fake kernel and strides of every op, on every backend."""

from itertools import chain

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map_only

from masked_kernels import _ops
from masked_kernels.backends import why_not

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def samples() -> dict[str, list[tuple[object, ...]]]:
    """Arguments of every op without the backend, some contiguous and some not."""
    n, k, m = 5, 33, 3
    mask = torch.rand(n, k) < 0.5
    words = _ops.pack(mask, "reference")
    scores, x, grad_y = torch.randn(n, k), torch.randn(m, k), torch.randn(m, n)
    dense, prototype, bias, scale = (
        torch.randn(n, k),
        torch.randn(7),
        torch.randn(n),
        torch.tensor(1.5),
    )
    image = torch.randn(2, 4, 6, 5)
    last = image.contiguous(memory_format=torch.channels_last)
    kernel_mask = torch.rand(6, 2, 3, 3) < 0.5
    kernel_words = _ops.pack(kernel_mask.view(6, 18), "reference")
    kernel_scores = torch.randn(6, 2, 3, 3)
    pointwise_words = _ops.pack(torch.rand(6, 4) < 0.5, "reference")
    depthwise_words = _ops.pack(torch.rand(4, 9) < 0.5, "reference")
    depthwise = ([3, 3], [1, 1], [1, 1], [1, 1], 4)
    geometry = ([2, 1], [1, 2], [1, 1], 2)
    point = ([1, 1], [0, 0], [1, 1], 1)
    affine = torch.randn(4, 6)
    grad_image = torch.randn(2, 6, 3, 7)
    grad_last = grad_image.contiguous(memory_format=torch.channels_last)
    grad_point = torch.randn(2, 6, 6, 5).contiguous(memory_format=torch.channels_last)
    stats = torch.rand(2, 4)
    return {
        "pack": [(mask,), (mask.t(),)],
        "unpack": [(words, k)],
        "popcount": [(words,)],
        "transpose": [(words, k)],
        "select_topk": [(scores, 80, True), (scores.t(), 80, False)],
        "select_topk_many": [([scores, x.t(), scores[:0]], [80, 0, 0], True), ([], [], False)],
        "select_threshold": [(scores, 0.1)],
        "select_nm": [(scores, 2, 4, True)],
        "decode": [(dense, words, k), (prototype, words, k)],
        "masked_linear": [
            (x, dense, words, bias, scale),
            (x.t().contiguous().t(), prototype, words, None, None),
        ],
        "masked_linear_grad_x": [
            (grad_y, prototype, words, scale, k),
            (grad_y, dense, words, None, k),
        ],
        "masked_linear_grad_weight": [(grad_y, x, words, None)],
        "scored_linear_grad_scores": [
            (grad_y, x, prototype, scores, scale, True),
            (grad_y, x, dense, scores, None, False),
        ],
        "compact_linear": [(x, dense[mask], words, bias, scale)],
        "masked_conv2d": [
            *(
                (t, prototype, kernel_words, torch.randn(6), scale, [3, 3], *geometry)
                for t in (image, last)
            ),
            *((t, prototype, pointwise_words, None, None, [1, 1], *point) for t in (image, last)),
        ],
        "masked_conv2d_fused": [
            *(
                (t, prototype, kernel_words, affine, "gelu", grad_image, [3, 3], *geometry)
                for t in (image, last)
            ),
            (last, prototype, pointwise_words, affine, "relu", None, [1, 1], *point),
            (last, prototype, depthwise_words, affine[:, :4], "identity", last, *depthwise),
        ],
        "masked_conv2d_chain": [
            (
                t,
                [prototype, prototype],
                [depthwise_words, pointwise_words],
                [affine[:, :4].contiguous(), affine],
                ["gelu", "identity"],
                [True, False],
                [*chain.from_iterable(depthwise[:-1]), depthwise[-1], 1, 1, 1, 1, 0, 0, 1, 1, 1],
            )
            for t in (image, last)
        ],
        "masked_conv2d_grad_x": [
            *(
                (grad, t, prototype, kernel_words, None, [3, 3], *geometry)
                for grad in (grad_image, grad_last)
                for t in (image, last)
            ),
            (grad_point, image, prototype, pointwise_words, scale, [1, 1], *point),
        ],
        "masked_conv2d_grad_weight": [
            (grad_image, image, kernel_words, scale, [3, 3], *geometry),
            (grad_last, last, kernel_words, None, [3, 3], *geometry),
        ],
        "gelu_stats": [(image,), (last,)],
        "gelu_batch_norm": [
            (image, stats, stats[0], stats[1], None, 1e-5),
            (last, stats, None, None, image, 0.1),
        ],
        "gelu_batch_norm_grads": [
            (image.neg(), image, stats, stats[0], True, 1e-5),
            (image, last, stats, None, False, 0.1),
        ],
        "batch_norm_stats": [(image,), (last,)],
        "batch_norm_relu": [
            (image, stats, stats[0], stats[1], None, 1e-5),
            (last, stats, None, None, image, 0.1),
        ],
        "batch_norm_relu_grads": [
            (image.neg(), image, stats, stats[0], stats[1], False, True, 1e-5),
            (image, last, stats, None, None, True, False, 0.1),
        ],
        "scored_conv2d_grad_scores": [
            (grad_image, image, prototype, kernel_scores, scale, True, *geometry),
            (grad_last, last, prototype, kernel_scores, None, False, *geometry),
        ],
        "scored_conv2d_grads": [
            (grad, t, prototype, kernel_words, kernel_scores, scale, True, *geometry)
            for grad in (grad_image, grad_last)
            for t in (image, last)
        ],
    }


def flat(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def skip_refused(name: str, backend: str) -> None:
    """A backend may lack an op; it says so whatever the arguments."""
    if reason := why_not(backend, name):
        pytest.skip(reason)


def test_every_op_has_samples() -> None:
    assert set(samples()) == set(_ops.NAMES)


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str, backend: str) -> None:
    skip_refused(name, backend)
    for arguments in samples()[name]:
        opcheck(
            getattr(torch.ops.masked_kernels, name).default,
            (*arguments, backend),
            test_utils=CHECKS,
        )


@pytest.mark.parametrize("name", sorted(samples()))
def test_fake_strides(name: str, backend: str) -> None:
    """The fake result has the strides of the real one, which opcheck compares for size-1 dimensions
    only loosely.
    """
    skip_refused(name, backend)
    op = getattr(_ops, name)
    for arguments in samples()[name]:
        real = op(*arguments, backend)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments), backend)
        for f, r in zip(flat(fake), flat(real), strict=True):
            assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@pytest.mark.parametrize("name", sorted(samples()))
def test_results_are_fresh_and_repeatable(name: str, backend: str) -> None:
    """No op returns or writes its inputs, and twice the same call gives the same bits."""
    skip_refused(name, backend)
    op = getattr(_ops, name)
    for arguments in samples()[name]:
        tensors = flat(arguments)
        before = [t.clone() for t in tensors]
        first, second = flat(op(*arguments, backend)), flat(op(*arguments, backend))
        assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
        inputs = {t.data_ptr() for t in tensors if t.numel()}
        assert inputs.isdisjoint(f.data_ptr() for f in first if f.numel())
