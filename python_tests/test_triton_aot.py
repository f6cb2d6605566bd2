"""Every Triton kernel compiles ahead of time for GPUs that are not here, and its code is read.

What the kernels compute is tested elsewhere: on a GPU, or in the interpreter by
``TRITON_INTERPRET=1 pytest --backend=triton``.
"""

import os

import pytest
import torch

from masked_kernels.backends import triton as backend

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench import aot, sass  # noqa: E402  they import triton
from masked_kernels.backends.triton import compact, config  # noqa: E402

DTYPE = torch.bfloat16


def calls() -> dict[str, list[tuple[object, ...]]]:
    """Arguments of every op, of sizes that take every kernel of the backend."""
    words, scale = torch.zeros(256, 8, dtype=torch.int32), torch.tensor(0.5)
    x, prototype, scores = _draw(512, 256), _draw(66), torch.randn(256, 256)
    wide = torch.zeros(1024, 64, dtype=torch.int32)  # 1024 x 2048
    image = _draw(8, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    kernel_words, kernel_scores = torch.zeros(64, 18, dtype=torch.int32), torch.randn(64, 64, 3, 3)
    filter_words, filter_scores = torch.zeros(64, 1, dtype=torch.int32), torch.randn(64, 1, 5, 5)
    full, depthwise = ([1, 1], [1, 1], [1, 1], 1), ([1, 1], [2, 2], [1, 1], 64)
    point_words, point = torch.zeros(64, 2, dtype=torch.int32), ([1, 1], [0, 0], [1, 1], 1)
    affine = torch.randn(4, 64)
    stats, vector = torch.rand(2, 64), torch.rand(64)
    planar = image.float().contiguous()
    one = _draw(1)  # random_padding's shortest; Triton compiles a period of 1 in
    return {
        "pack": [(torch.zeros(256, 256, dtype=torch.bool),)],
        "unpack": [(words, 256)],
        "popcount": [(words,)],
        "transpose": [(words, 256)],
        "select_topk": [(scores, 100, True)],
        "select_topk_many": [([scores.half(), scores[:5].half()], [100, 0], False)],
        "select_threshold": [(scores, 0.5)],
        "select_nm": [(scores, 2, 4, True)],
        "decode": [(prototype, words, 256)],
        "masked_linear": [
            (x[:1], prototype, words, None, None),
            (x, prototype, words, _draw(256), scale),
            (x.float(), prototype.float(), words, None, None),
            (x[:64], one, words, None, None),
            (_draw(4, 2048), _draw(2048), wide, None, scale),
            (_draw(4, 2048).half(), _draw(64).half(), wide, None, None),
        ],
        "masked_linear_grad_x": [(x, prototype, words, scale, 256), (x, one, words, None, 256)],
        "masked_linear_grad_weight": [(x, x, words, scale)],
        "scored_linear_grad_scores": [
            (x, x, prototype, scores, scale, True),
            (x, x, one, scores, None, True),
        ],
        "compact_linear": [(x[:1], _draw(0), words, None, None), (x, _draw(0), words, None, scale)],
        "masked_conv2d": [
            (image, prototype, kernel_words, None, scale, [3, 3], *full),
            (image, one, kernel_words, None, None, [3, 3], *full),
            (image, one, filter_words, None, None, [5, 5], *depthwise),
            (image, prototype, filter_words, _draw(64), None, [5, 5], *depthwise),
        ],
        "masked_conv2d_fused": [
            (image, prototype, kernel_words, affine, "gelu", image, [3, 3], *full),
            (image, prototype, filter_words, affine, "gelu", image, [5, 5], *depthwise),
            (image, prototype, point_words, affine, "relu", image, [1, 1], *point),
        ],
        "masked_conv2d_grad_x": [
            (image, image, prototype, kernel_words, scale, [3, 3], *full),
            (image, image, prototype, filter_words, None, [5, 5], *depthwise),
        ],
        "masked_conv2d_grad_weight": [
            (image, image, kernel_words, scale, [3, 3], *full),
            (image, image, filter_words, None, [5, 5], *depthwise),
        ],
        "scored_conv2d_grad_scores": [
            (image, image, prototype, kernel_scores, scale, True, *full),
            (image, image, one, kernel_scores, None, True, *full),
            (image, image, prototype, filter_scores, None, True, *depthwise),
        ],
        "gelu_stats": [(image,), (planar,)],
        "gelu_batch_norm": [
            (image, stats, vector, vector, image, 1e-5),
            (planar, stats, None, None, None, 1e-5),
        ],
        "gelu_batch_norm_grads": [
            (image, image, stats, vector, True, 1e-5),
            (planar, planar, stats, None, False, 1e-5),
        ],
        "batch_norm_stats": [(image,), (planar,)],
        "batch_norm_relu": [
            (image, stats, vector, vector, image, 1e-5),
            (planar, stats, None, None, None, 1e-5),
        ],
        "batch_norm_relu_grads": [
            (image, image, stats, vector, vector, False, True, 1e-5),
            (planar, planar, stats, None, None, True, False, 1e-5),
        ],
    }


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DTYPE)


def test_every_op_has_a_call() -> None:
    compositions = {"masked_conv2d_chain", "scored_conv2d_grads"}
    assert set(calls()) | compositions == set(backend._HOME)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", sorted(calls()))
def test_compiles(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "check_count", lambda *_: None)  # nothing has been counted
    ways = (None, False, True) if "topk" in name else (None,)
    for warm in ways:
        monkeypatch.setattr(config, "is_small", lambda *_, warm=warm: warm is None)
        monkeypatch.setattr(config, "warm_start_pays", lambda total, warm=warm: warm)
        for arguments in calls()[name]:
            kernels = aot.compiled(lambda args=arguments: getattr(backend, name)(*args), target)
            assert kernels
            assert bool(warm) == ("_split_kernel" in {kernel.name for kernel in kernels})
            for kernel in kernels:
                assert kernel.metadata.target == aot.TARGETS[target]
                assert kernel.metadata.shared <= aot.SHARED_BYTES[target]
                assert len(kernel.asm["hsaco" if target == "gfx942" else "cubin"]) > 0


def test_inner_loops_are_what_the_table_says() -> None:
    """Few instructions and no spills; the table is remade by ``python -m bench.sass``."""
    rows = sass.measured()
    if f"Triton {triton.__version__}." in sass.TABLE.read_text():  # another one counts otherwise
        assert sass.render(rows) == sass.TABLE.read_text()
    for row in rows:
        assert row.stack == 0, row
        if row.kernel.startswith("aligned"):
            assert row.per_weight <= 2.7, row
        if row.target == "sm_90" and row.kernel.startswith("large"):
            assert "HGMMA" in row.loop, row
