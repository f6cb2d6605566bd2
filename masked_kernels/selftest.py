"""Every available backend on tiny cases; ``python -m masked_kernels selftest``.

Bits must equal those of the reference backend. Results and gradients are held against the
reference in float64: their error may be twice that of the reference in the same dtype, plus one
rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import BackendError, backends, use_backend
from .functional import masked_conv2d, masked_linear, scored_conv2d, scored_linear
from .mask import PackedMask
from .prototype import Prototype
from .rules import NM, Threshold, TopK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Compute = Callable[[torch.dtype], dict[str, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """One case on one backend: ``status`` is ok, failed or skipped, and ``detail`` says why."""

    backend: str
    case: str
    status: str
    detail: str = ""


def run() -> Iterator[Outcome]:
    """All cases on all backends, best first; an unavailable backend is one skipped outcome."""
    for backend, reason in backends().items():
        if reason is not None:
            yield Outcome(backend, "all", "skipped", reason)
            continue
        yield _outcome(backend, "bits", _compare_bits)
        for name, compute in _CASES.items():
            for dtype in DTYPES:
                case = f"{name} {str(dtype).removeprefix('torch.')}"
                yield _outcome(backend, case, _compare, compute, dtype)


def _outcome(backend: str, case: str, compare: Callable[..., str], *problem: Any) -> Outcome:
    try:
        wrong = compare(backend, *problem)
    except BackendError as reason:
        return Outcome(backend, case, "skipped", str(reason))
    except Exception as error:  # a broken backend may raise anything; the rest should still run
        wrong = f"{type(error).__name__}: {error}"
    return Outcome(backend, case, "failed" if wrong else "ok", wrong)


def _compare(backend: str, compute: Compute, dtype: torch.dtype) -> str:
    """What is wrong, or an empty string."""
    with use_backend("reference"):
        plain, truth = compute(dtype), compute(torch.float64)
    with use_backend(backend):
        results = compute(dtype)
    for name, got in results.items():
        error = (got.double() - truth[name]).norm()
        bound = 2 * (plain[name].double() - truth[name]).norm()
        bound += torch.finfo(dtype).eps * truth[name].norm()
        if got.shape != truth[name].shape or got.dtype != plain[name].dtype or not error <= bound:
            return f"{name}: error {error:.2e}, expected at most {bound:.2e}"
    return ""


def _compare_bits(backend: str) -> str:
    with use_backend("reference"):
        expected = _bits()
    with use_backend(backend):
        results = _bits()
    wrong = [name for name in expected if not torch.equal(results[name], expected[name])]
    return f"differ from the reference: {', '.join(wrong)}" if wrong else ""


def _bits() -> dict[str, Tensor]:
    """Words and counts, with scores that tie and a row that ends inside a word."""
    scores = (_draw((9, 45), torch.float32, seed=1) * 4).round()
    mask = PackedMask.from_bool(scores > 0)
    return {
        "pack": mask.words,
        "unpack": mask.unpack(),
        "popcount": torch.tensor(mask.count()),
        "transpose": mask.transpose().words,
        "TopK": TopK(0.3)(scores).words,
        "TopK(absolute=False)": TopK(0.7, absolute=False)(scores).words,
        "Threshold": Threshold(1.0)(scores).words,
        "NM": NM(2, 4)(scores).words,
    }


def _linear(values: str) -> Compute:
    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        x, bias = _leaf((3, 45), dtype, 2), _leaf((9,), dtype, 3)
        weight, scores = _weight(values, (9, 45), dtype), _draw((9, 45), torch.float32, 5)
        masked = masked_linear(x, weight, TopK()(scores), bias, scale=0.5)
        learned = scores.requires_grad_()
        scored = scored_linear(x, weight, learned, TopK(), bias)
        return _results(masked + scored, x, bias, weight, learned)

    return compute


def _conv2d(values: str, channels: int, groups: int) -> Compute:
    shape = (4, channels // groups, 3, 3)

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        x, bias = _leaf((2, channels, 6, 5), dtype, 2), _leaf((4,), dtype, 3)
        weight, scores = _weight(values, shape, dtype), _draw(shape, torch.float32, 5)
        options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups}
        masked = masked_conv2d(x, weight, TopK()(scores), bias, **options, scale=0.5)
        learned = scores.requires_grad_()
        scored = scored_conv2d(x, weight, learned, TopK(), bias, **options)
        return _results(masked + scored, x, bias, weight, learned)

    return compute


_CASES = {
    "linear, dense weight": _linear("dense"),
    "linear, prototype": _linear("prototype"),
    "conv2d, dense weight": _conv2d("dense", channels=3, groups=1),
    "conv2d, prototype": _conv2d("prototype", channels=3, groups=1),
    "conv2d, depthwise": _conv2d("prototype", channels=4, groups=4),
}


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers that every dtype holds exactly, so that all dtypes see the same problem."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().clamp(-4, 4).to(dtype)


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return _draw(shape, dtype, seed).requires_grad_()


def _weight(values: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | Prototype:
    return _leaf(shape, dtype, 4) if values == "dense" else Prototype(_draw((7,), dtype, 4))


def _results(
    y: Tensor, x: Tensor, bias: Tensor, weight: Tensor | Prototype, scores: Tensor
) -> dict[str, Tensor]:
    """The output, and the gradients of everything that has one."""
    torch.autograd.backward(y, _draw(tuple(y.shape), y.dtype, 6))
    leaves = {"x": x, "bias": bias, "weight": weight, "scores": scores}
    grads = {
        f"gradient of {name}": leaf.grad
        for name, leaf in leaves.items()
        if isinstance(leaf, Tensor) and leaf.grad is not None
    }
    return {"output": y.detach(), **grads}
