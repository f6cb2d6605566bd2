"""torch.compile(fullgraph=True) and torch.export: outputs and gradients as in eager mode."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import masked_kernels as mk
from masked_kernels.backends import check_scores

FUNCTIONS = ("masked_linear", "scored_linear", "masked_conv2d", "scored_conv2d")
RULES = (mk.TopK(0.3), mk.Threshold(0.0, rescale=True), mk.NM())


def build(function: str, rule: mk.Rule, backend: str):
    """A call on (x, scores) and its inputs."""
    conv = "conv" in function
    shape = (6, 4, 3, 3) if conv else (6, 33)
    x = torch.randn((2, 4, 7, 7) if conv else (5, 33), requires_grad=True)
    scores = torch.randn(shape, requires_grad=True)
    prototype, bias = mk.Prototype(torch.randn(13)), torch.randn(6)
    mask = rule(scores)
    kwargs = {"padding": "same"} if conv else {}

    def call(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if function.startswith("masked"):
            return getattr(mk, function)(
                x, prototype, mask, bias, scale=0.5, backend=backend, **kwargs
            )
        return getattr(mk, function)(x, prototype, scores, rule, bias, backend=backend, **kwargs)

    return call, x, scores


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_fullgraph(function: str, rule: mk.Rule, backend: str) -> None:
    torch._dynamo.reset()
    call, x, scores = build(function, rule, backend)
    inputs = (x,) if function.startswith("masked") else (x, scores)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(x, scores), compiled(x, scores)
    assert torch.equal(got, expected)
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(expected, inputs, weights),
        torch.autograd.grad(got, inputs, weights),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_compile_with_dynamic_batch() -> None:
    torch._dynamo.reset()
    call, _, scores = build("scored_linear", mk.TopK(), "auto")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 9):
        x = torch.randn(batch, 33)
        assert torch.equal(compiled(x, scores), call(x, scores))


def test_compiled_graph_obeys_use_backend() -> None:
    torch._dynamo.reset()
    call, x, scores = build("scored_linear", mk.TopK(), "auto")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(x, scores)
    with mk.use_backend("reference"):
        assert torch.equal(compiled(x, scores), call(x, scores))
    scores.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores: NaN"):
        compiled(x, scores)
        check_scores()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
def test_compile_and_export_models(packed: bool) -> None:
    torch._dynamo.reset()
    model = Net().eval()
    mk.mask_model_(model, mk.recipes.random_padding(1e-1))
    if packed:
        mk.pack_model_(model)
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), expected)
    assert "masked_kernels.masked_conv2d" in str(exported.graph)


def test_first_call_of_a_process_may_be_compiled() -> None:
    """With inductor, as users run it, in a fresh interpreter in which Triton cannot be imported."""
    code = """
import sys
sys.modules["triton"] = None
import torch, masked_kernels as mk
x, s = torch.randn(2, 40), torch.randn(3, 40, requires_grad=True)
p = mk.Prototype(torch.randn(7))
f = torch.compile(lambda x, s: mk.scored_linear(x * 2, p, s, mk.TopK()), fullgraph=True)
y = f(x, s)
y.sum().backward()
torch.testing.assert_close(y, mk.scored_linear(x * 2, p, s, mk.TopK()))
print("ok", s.grad.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ok torch.Size([3, 40])"), done.stderr
