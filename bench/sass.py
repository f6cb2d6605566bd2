"""``python -m bench.sass``: instructions per weight in the inner loops of the Triton kernels.

No GPU is needed: kernels are compiled for each architecture and their machine code is read. A
lane's instructions of one step of the loop, all warps together, are divided by the weights that the
step decodes. It is a count, not a time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from masked_kernels.backends import triton as backend
from masked_kernels.backends.triton import compact, config

from . import aot

TABLE = Path(__file__).parent.parent / "docs" / "results" / "sass.md"
_ROWS = _COLS = 4096
_ALIGNED = (
    (1, torch.bfloat16),
    (32, torch.bfloat16),
    (64, torch.bfloat16),
    (16, torch.float16),
    (1, torch.float32),
)
_HEADER = """\
# Instructions per weight

Inner loops of the Triton kernels, counted in the machine code by `python -m bench.sass`; weights
4096 x 4096, Triton {version}. Compiled, not run: these are counts, not times. *Aligned* is the
kernel of bit planes; the others decode any period, *compact* reads kept values only. A depthwise
convolution, 256 channels on channels_last images, counts the products of a filter's row.

| kernel | target | instructions / weight | registers | stack | most frequent |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    kernel: str
    target: str
    per_weight: float
    registers: int
    stack: int
    loop: Counter[str]


@dataclass(frozen=True)
class _Case:
    kernel: str
    call: Callable[[], object]
    name: str  # of the kernel among those that the call launches
    weights: Callable[[str], int]  # decoded in one step of the loop of one program, by target


def measured() -> list[Row]:
    """Every case on every CUDA target."""
    rows = []
    for case in _cases():
        for target in aot.TARGETS:
            if aot.TARGETS[target].backend == "cuda":
                (kernel,) = (k for k in aot.compiled(case.call, target) if k.name == case.name)
                code = aot.code(kernel)
                lanes = 32 * kernel.metadata.num_warps
                per_weight = len(code.loop) * lanes / case.weights(target)
                rows.append(
                    Row(
                        case.kernel,
                        target,
                        per_weight,
                        code.registers,
                        code.stack,
                        Counter(code.loop),
                    )
                )
    return rows


def render(rows: list[Row]) -> str:
    """The committed table."""
    lines = [_HEADER.format(version=triton.__version__)]
    for row in rows:
        frequent = ", ".join(f"{name} {count}" for name, count in row.loop.most_common(5))
        cells = (
            row.kernel,
            row.target,
            f"{row.per_weight:.2f}",
            str(row.registers),
            str(row.stack),
            frequent,
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _cases() -> list[_Case]:
    words = torch.zeros(_ROWS, _COLS // 32, dtype=torch.int32)

    def call(tokens: int, period: int, dtype: torch.dtype) -> Callable[[], object]:
        x, values = torch.zeros(tokens, _COLS, dtype=dtype), torch.zeros(period, dtype=dtype)
        return lambda: backend.masked_linear(x, values, words, None, None)

    def planes(slots: int) -> Callable[[str], int]:
        def weights(target: str) -> int:
            tile = config.planes_tile(slots, from_registers=target != "sm_100")
            return tile.rows * tile.depth * 16

        return weights

    cases = []
    for tokens, dtype in _ALIGNED:
        label = f"aligned, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        run, weights = call(tokens, _COLS, dtype), planes(tokens * config.slices(dtype))
        cases.append(_Case(label, run, "_aligned_linear_kernel", weights))
    for label, tokens in (("any period", 16), ("large", 128)):
        tile = config.linear_tile(tokens, _ROWS, torch.bfloat16)
        run, count = call(tokens, 167_773, torch.bfloat16), tile.rows * tile.depth
        label = f"{label}, {tokens} tokens, bfloat16"
        cases.append(_Case(label, run, "_masked_linear_kernel", lambda _, count=count: count))
    return [*cases, _compact(words), *map(_depthwise, (5, 7))]


def _compact(words: torch.Tensor) -> _Case:
    tokens = 16
    x, kept = torch.zeros(tokens, _COLS, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    tile = config.linear_tile(tokens, _ROWS, torch.bfloat16)

    def call() -> object:
        return compact.multiplied(x, kept, words, None, None)  # what checks kept would count bits

    label = f"compact, {tokens} tokens, bfloat16"
    return _Case(label, call, "_compact_linear_kernel", lambda _: tile.rows * tile.depth)


def _depthwise(kernel: int) -> _Case:
    channels, size = 256, 32
    image = torch.zeros(1, channels, size, size, dtype=torch.bfloat16)
    image = image.contiguous(memory_format=torch.channels_last)
    words, values = torch.zeros(channels, 2, dtype=torch.int32), image.new_zeros(channels)
    geometry = ([kernel, kernel], [1, 1], [kernel // 2, kernel // 2], [1, 1], channels)
    tile = config.strips_tile(channels, (size, size), (kernel, kernel), True, True)

    def call() -> object:
        return backend.masked_conv2d(image, values, words, None, None, *geometry)

    products = tile.rows * tile.strips * tile.strip * tile.down * kernel
    label = f"depthwise {kernel} x {kernel}, bfloat16"
    return _Case(label, call, "_depthwise_conv2d_kernel", lambda _: products)


if __name__ == "__main__":
    table = render(measured())
    TABLE.write_text(table)
    print(table, end="")
