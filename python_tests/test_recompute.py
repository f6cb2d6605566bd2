"""recompute_norms: the same gradients from less that is kept."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels.backends import why_unavailable
from masked_kernels.nn import FusedSequential, Residual, recompute, recompute_norms

if reason := why_unavailable("cpu"):
    pytest.skip(f"backend 'cpu' is unavailable: {reason}", allow_module_level=True)

CHANNELS = 4


def unit(*modules: nn.Module) -> FusedSequential:
    return FusedSequential(*modules, nn.GELU(), nn.BatchNorm2d(CHANNELS))


def block() -> FusedSequential:
    """As ConvMixer's: an input of one convolution is the sum of two outputs."""
    depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
    inner = Residual(depthwise, nn.GELU(), nn.BatchNorm2d(CHANNELS))
    return unit(inner, nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False))


@pytest.fixture
def model() -> nn.Sequential:
    stem = unit(nn.Conv2d(3, CHANNELS, 2, stride=2, bias=False))
    model = nn.Sequential(stem, block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return mk.mask_model_(model, mk.recipes.edge_popup()) and model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 10, 10).contiguous(memory_format=torch.channels_last)


def gradients(model: nn.Module) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    return grads


def test_gradients_are_the_same(model: nn.Sequential, x: Tensor) -> None:
    found = []
    for keeping in (nullcontext, recompute_norms):
        with keeping():
            loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2]))
        loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == 5 + 2 * 5  # scores, norms
    assert all(map(torch.equal, *found))


def test_only_the_inputs_of_norms_are_kept(model: nn.Sequential, x: Tensor) -> None:
    """Outputs of the five norms die with the forward, but for the last, which the loss keeps."""
    alive = {}
    for keeping in (nullcontext, recompute_norms):
        outputs: list[weakref.ref[Tensor]] = []
        hooks = [
            module.register_forward_hook(lambda m, i, y, to=outputs: to.append(weakref.ref(y)))
            for module in model.modules()
            if isinstance(module, FusedSequential)
        ]
        with keeping():
            y = model(x)
        gc.collect()
        alive[keeping] = sum(ref() is not None for ref in outputs)
        assert len(outputs) == 5 and y.grad_fn is not None
        for hook in hooks:
            hook.remove()
    assert alive == {nullcontext: 4, recompute_norms: 0}


def test_what_is_kept_must_not_change(model: nn.Sequential, x: Tensor) -> None:
    with recompute_norms():
        y = model(x)
    with torch.no_grad():
        model[1][3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since the forward: got version"):
        y.sum().backward()


def test_an_output_that_is_changed_is_kept_itself(x: Tensor) -> None:
    found = []
    for keeping in (nullcontext, recompute_norms):
        torch.manual_seed(0)
        first = unit(nn.Conv2d(3, CHANNELS, 1))
        last = nn.Conv2d(CHANNELS, 2, 1)
        with keeping():
            y = last(first(x).mul_(3))
        y.square().sum().backward()
        found.append(gradients(nn.ModuleList([first, last])))
    assert all(map(torch.equal, *found))


def test_memory_that_another_tensor_got_is_not_taken_for_the_output(x: Tensor) -> None:
    y, other = unit(nn.Conv2d(3, CHANNELS, 1))(x), torch.randn(2)
    gone = weakref.ref(torch.randn(2))
    made = recompute._Made()
    for memory in (y, other):
        made.outputs[recompute._memory(memory)] = recompute._Output(gone, None)
        assert made.pack(memory).make() is memory


def test_outside_of_training_nothing_is_kept(model: nn.Sequential, x: Tensor) -> None:
    expected = model.eval()(x)
    with recompute_norms(), torch.no_grad():
        assert torch.equal(model(x), expected)
