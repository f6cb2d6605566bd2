"""Where the published implementations go wrong, or may be read two ways: what happens there, and
that it does not happen here.

edge-popup's code, PEMN's, and torchao's descendant of them. The functions below do what those do in
words of our own; each test first shows the trap.
"""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels.backends import check_scores


def published_mask(keys: Tensor, density: float) -> Tensor:
    """Sort, then write 0 and 1 through what is hoped to be a view (edge-popup, PEMN)."""
    mask = keys.clone()
    order = keys.flatten().sort().indices
    drop = int((1 - density) * keys.numel())
    flat = mask.flatten()
    flat[order[:drop]] = 0
    flat[order[drop:]] = 1
    return mask


def faster_mask(scores: Tensor, sparsity: float) -> Tensor:
    """The "faster" variant of edge-popup's README: a k-th value, and all that reach it."""
    rank = 1 + round(sparsity * (scores.numel() - 1))
    return scores >= scores.flatten().kthvalue(rank).values


def pointwise(scores: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return mk.scored_linear(x, weight, scores, mk.TopK(0.5))


def test_channels_last_scores_make_the_same_mask(backend: str) -> None:
    """Flattening channels_last copies: the published writes are lost, and |scores| is the mask."""
    scores = torch.randn(8, 16, 3, 3)
    last = scores.contiguous(memory_format=torch.channels_last)
    assert published_mask(scores.abs(), 0.5).unique().tolist() == [0, 1]
    assert torch.equal(published_mask(last.abs(), 0.5), last.abs())

    x, weight = torch.randn(2, 16, 5, 5), torch.randn(8, 16, 3, 3)
    for rule in (mk.TopK(0.3), mk.NM(2, 4), mk.Threshold(0.1)):
        with mk.use_backend(backend):
            assert rule(last) == rule(scores)
            results = []
            for s in (scores, last):
                s = s.detach().requires_grad_()
                y = mk.scored_conv2d(x, weight, s, rule)
                results.append((y, *torch.autograd.grad(y.square().sum(), s)))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


def test_density_is_always_the_fraction_kept(backend: str) -> None:
    """edge-popup passes ``prune_rate`` on as the fraction kept; its README's faster variant takes
    the fraction removed under the old name's place.
    """
    scores = torch.randn(100)
    assert published_mask(scores, 0.3).sum() == 30
    assert faster_mask(scores, 0.3).sum() == 70

    with mk.use_backend(backend):
        assert mk.TopK(0.3)(scores).count() == 30
    recipes = (mk.recipes.edge_popup, mk.recipes.one_layer, mk.recipes.max_layer_padding)
    for config in (*(recipe(0.3) for recipe in recipes), mk.recipes.random_padding(0.1, 0.3)):
        model = nn.Sequential(nn.Linear(20, 20, bias=False))
        mk.mask_model_(model, config)
        assert model[0].mask.count() == 120
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    mk.pruning.prune_model_(model, density=0.3)
    assert model[0].mask.count() == 120


def test_no_argument_is_named_after_what_is_removed() -> None:
    ambiguous = {"sparsity", "prune_rate", "prune_ratio", "pruning_rate", "k", "amount"}
    members = [
        member
        for module in (mk, mk.recipes, mk.pruning, mk.nn)
        for _, member in inspect.getmembers(module, callable)
        if member.__module__.startswith(mk.__name__) and not hasattr(member, "with_traceback")
    ]
    assert len(members) > 40
    for member in members:
        assert not ambiguous & inspect.signature(member).parameters.keys(), member


def test_scale_fan_counts_the_inputs_kept() -> None:
    """edge-popup multiplies the fan-in by ``1 - prune_rate``, of which it keeps ``prune_rate``."""
    model = nn.Sequential(nn.Linear(50, 50))
    mk.mask_model_(model, mk.recipes.edge_popup(0.1, scale_fan=True, weight_init="signed_constant"))
    torch.testing.assert_close(model[0].weight.abs(), torch.full((50, 50), (2 / 5) ** 0.5))


def test_rounding_of_the_kept_count() -> None:
    """n - int((1 - density) * n) rounds the kept count up, float artefacts included: the released
    code's count, which round(density * n) is not.
    """
    cases = {(75, 0.5): 38, (10, 0.9): 10, (7, 0.3): 3, (5, 0.1): 1, (3, 0.0): 0, (3, 1.0): 3}
    for (n, density), kept in cases.items():
        scores = torch.randn(n)
        assert mk.TopK(density)(scores).count() == published_mask(scores, density).sum() == kept
        assert mk.pruning.prune_masks({"": scores}, density)[""].count() == kept
    # (1 - 0.9) * 10 is just under 1, so that nothing is dropped
    assert [round(density * n) for n, density in cases] != list(cases.values())


def test_ties_keep_exactly_as_many(backend: str) -> None:
    """Of equal scores a threshold keeps all or none; an unstable sort keeps any."""
    scores = torch.full((10,), 0.25)
    assert faster_mask(scores, 0.5).all()
    with mk.use_backend(backend):
        assert mk.TopK(0.5)(scores).unpack().tolist() == [False] * 5 + [True] * 5
        assert mk.TopK(0.5)(-scores).unpack().tolist() == [False] * 5 + [True] * 5


def test_kth_value_is_not_off_by_one(backend: str) -> None:
    """The faster variant keeps 6 of 10 where it should keep 5."""
    scores = torch.arange(10.0)
    assert faster_mask(scores, 0.5).sum() == 6
    with mk.use_backend(backend):
        for n in (1, 2, 9, 10, 32, 33):
            kept = mk.TopK(0.5)(torch.arange(1.0, n + 1)).unpack()
            assert kept.tolist() == [i >= n // 2 for i in range(n)]


def test_negative_scores_rank_by_magnitude(backend: str) -> None:
    """torchao's descendant ranks the raw score, and drops what training pushed far below 0."""
    scores = torch.tensor([[-4.0, 1.0, 3.0, -2.0]])
    with mk.use_backend(backend):
        assert mk.TopK(0.5)(scores).unpack().tolist() == [[True, False, True, False]]
        raw = mk.TopK(0.5, absolute=False)(scores)
        assert raw.unpack().tolist() == [[False, True, True, False]]


def test_score_gradient_has_the_weight_and_the_sign(backend: str) -> None:
    """torchao's descendant passes dL/dW on as it is: a step that ignores the weight's sign."""
    scores, x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8), torch.randn(6, 8)
    grad_y = torch.randn(4, 6)
    descendant = grad_y.t() @ x
    with mk.use_backend(backend):
        (got,) = torch.autograd.grad(pointwise(scores, x, weight), scores, grad_y)
        raw = mk.scored_linear(x, weight, scores, mk.TopK(0.5, absolute=False))
        (got_raw,) = torch.autograd.grad(raw, scores, grad_y)
    torch.testing.assert_close(got, descendant * weight * scores.sign())
    torch.testing.assert_close(got_raw, descendant * weight)
    assert (got.sign() != descendant.sign()).any()


def test_masked_out_scores_get_a_gradient_too(backend: str) -> None:
    """Through ``weight * mask`` with a hard mask they would get none, and never come back."""
    scores = torch.randn(6, 8, requires_grad=True)
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    mask = mk.TopK(0.5)(scores).unpack()
    hard = (scores.abs() * mask * weight).sum()
    assert not torch.autograd.grad(hard, scores)[0][~mask].any()
    with mk.use_backend(backend):
        (grad,) = torch.autograd.grad(pointwise(scores, x, weight).sum(), scores)
    assert grad.all()


def test_a_score_of_zero_gets_no_gradient(backend: str) -> None:
    """sign(0) is 0, of a negative zero too. A sign taken from the sign bit would make it 1."""
    scores = torch.tensor([[0.0, -0.0, 1.0, -1.0]], requires_grad=True)
    assert scores.detach().copysign(torch.tensor(1.0)).sign().tolist() == [[0, 0, 1, 1]]
    with mk.use_backend(backend):
        y = pointwise(scores, torch.ones(1, 4), torch.ones(1, 4))
        (grad,) = torch.autograd.grad(y, scores)
    assert grad.tolist() == [[0, 0, 1, -1]]


def test_a_nan_score_raises(backend: str) -> None:
    """A sort puts NaN last: the published mask keeps it and training goes on."""
    scores = torch.tensor([[0.1, math.nan, 0.3, 0.2]])
    assert published_mask(scores.abs(), 0.25).tolist() == [[0, 1, 0, 0]]
    model = nn.Sequential(nn.Linear(4, 1))
    mk.mask_model_(model, mk.recipes.edge_popup())
    with torch.no_grad():
        model[0].scores.copy_(scores)
    for mode in (True, False):
        with mk.use_backend(backend), pytest.raises(ValueError, match="NaN at flat index 1"):
            model.train(mode)(torch.ones(1, 4))
            check_scores()


def test_a_prototype_keeps_the_std_of_its_layer() -> None:
    """PEMN's ``rescale_var`` flag is read by nothing: padded layers of another fan-in keep the
    prototype's std, 0.088 where the depthwise layer's own would be 0.283.
    """
    model = mk.models.create_model("convmixer", dim=256, depth=1)
    mk.mask_model_(model, mk.recipes.max_layer_padding())
    own = mk.models.create_model("convmixer", dim=256, depth=1)
    mk.mask_model_(own, mk.recipes.edge_popup())
    for name, fan_in in (("stem.0", 12), ("blocks.0.depthwise.0", 25), ("head", 256)):
        layer = model.get_submodule(name)
        filled = layer.prototype.fill(layer.weight_shape)
        assert filled.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
        own_std = own.get_submodule(name).weight.std().item()
        assert own_std == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_a_period_is_one_more_than_the_product() -> None:
    """int(M * r) + 1, also where M * r is whole or a float away from it; 1 keeps all of M."""
    assert mk.prototype_period(1000, 0.1) == 101 != math.ceil(1000 * 0.1)
    assert mk.prototype_period(100, 0.29) == 29 and 100 * 0.29 < 29
    assert mk.prototype_period(65_536, 1e-5) == 1
    assert mk.prototype_period(65_536, 1.0) == 65_536
    assert mk.prototype_period(4, 0.999) == 4


def test_padding_takes_the_prefix_of_the_first_largest_layer() -> None:
    """The paper samples a vector; the code takes the beginning of the first largest layer's weights
    as initialised, and of equals the first, linear layers included.
    """
    kinds = (nn.Conv2d, 2, 4, 1), (nn.Conv2d, 4, 16, (1, 2)), (nn.Linear, 16, 8), (nn.Linear, 8, 16)
    drawn, model = (nn.Sequential(*(kind(*sizes) for kind, *sizes in kinds)) for _ in range(2))
    mk.mask_model_(drawn, mk.recipes.edge_popup(), seed=4)
    mk.mask_model_(model, mk.recipes.random_padding(0.1), seed=4)
    assert [layer.weight.numel() for layer in drawn] == [8, 128, 128, 128]
    prefix = drawn[1].weight.flatten()[:13]
    assert torch.equal(model[0].prototype.values, prefix)
    for layer in model:
        flat = layer.prototype.fill(layer.weight_shape).flatten()
        assert torch.equal(flat, prefix.repeat(10)[: flat.numel()])


def test_one_layer_shares_among_linear_layers_too() -> None:
    """The released code looks at convolutions alone, which a ViT would leave without sharing."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Conv2d(8, 8, 1))
    mk.mask_model_(model, mk.recipes.one_layer())
    assert model[0].weight is model[2].weight and model[1].weight is model[3].weight
    assert model[0].weight is not model[1].weight  # shapes are equal with all their dimensions


def test_the_mask_of_a_saved_model_is_not_made_again() -> None:
    """The published layers sort in evaluation too; a packed layer has its bits."""
    model = nn.Sequential(nn.Linear(8, 8))
    mk.mask_model_(model, mk.recipes.edge_popup())
    mask = model[0].mask
    x = torch.randn(2, 8)
    expected = F.linear(x, torch.where(mask.unpack(), model[0].weight, 0), model[0].bias)
    mk.pack_model_(model)
    torch.testing.assert_close(model(x), expected)
    assert model[0].mask == mask and not hasattr(model[0], "scores")
