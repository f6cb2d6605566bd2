"""A result as Markdown: ``python -m bench.report bench/results/NAME.json``."""

import argparse
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

OURS = "ours"
Rows = list[list[str]]

TITLES = {
    "select_topk": "Scores to a mask",
    "masked_linear": "Linear layers",
    "masked_conv2d": "Convolutions",
    "network": "Packed networks and blocks",
    "training": "Training steps of networks",
    "trained_layer": "Training of a layer",
}
README = (
    "select_topk n=23,462,592",
    "select_topk n=23,462,592 after a step",
    *(f"masked_linear 8192x8192 prototype 0.0001 aligned batch={b}" for b in (1, 8, 64, 512)),
    *(f"masked_linear 4096x4096 prototype 0.0001 aligned batch={b}" for b in (1, 64)),
    *(f"masked_linear 1024x1024 prototype 0.0001 aligned batch={b}" for b in (1, 64)),
    *(f"masked_linear 512x512 prototype 0.0001 aligned batch={b}" for b in (1, 64)),
    "masked_linear 1536x512 prototype 0.0001 aligned batch=4160 (ViT-512 qkv)",
    *(f"masked_linear 4096x4096 prototype 0.01 batch={b}" for b in (1, 8, 64)),
    *(f"masked_linear 512x512 prototype 0.01 batch={b}" for b in (1, 8, 64)),
    *(f"masked_linear 4096x4096 dense batch={b}" for b in (1, 8, 64)),
    *(f"masked_linear 4096x4096 dense compact batch={b}" for b in (1, 8)),
    "masked_conv2d 1x1 256->256 on 64x16x16 prototype 0.0001 aligned (ConvMixer-256)",
    "masked_conv2d 1x1 256->256 on 64x16x16 prototype 0.01 (ConvMixer-256)",
    "masked_conv2d depthwise 5x5 256->256 on 64x16x16 prototype 0.01 (ConvMixer-256)",
    "masked_conv2d 3x3 64->64 on 8x56x56 prototype 0.0001 aligned (ResNet-18)",
    "masked_conv2d 3x3 512->512 on 8x7x7 prototype 0.0001 aligned (ResNet-18)",
    "masked_conv2d 1x1 256->64 on 8x56x56 prototype 0.0001 aligned (ResNet-50)",
    "packed ConvMixer-256 depthwise 5x5 + gelu + norm + residual batch=64",
    *(f"packed ConvMixer-256/8 batch={b}" for b in (1, 64)),
    "training step ConvMixer-256/8 aligned batch=64",
    "scored_linear 1536x512 aligned batch=4160, with backward (ViT-512 qkv)",
)
"""The cases that the README shows."""


def render(result: dict[str, Any]) -> str:
    """The machine, then a table for each group, a line for each provider; wins and losses alike."""
    machine, peaks = result["machine"], result["peaks"]
    commit = f"{(machine['commit'] or 'unknown')[:9]}{' (dirty)' if machine['dirty'] else ''}"
    facts = (
        machine["cpu"],
        f"{machine['threads']} of {machine['cores']} cores",
        machine["isa"] or "no native code",
        f"torch {machine['torch']}",
        f"backend {result['backend']}",
        *(["malloc keeps its pages"] if machine.get("keeps_pages") else []),
        f"commit {commit}",
        machine["date"][:10],
    )
    lines = [
        f"{', '.join(facts)}: `{machine['command']}`",
        "",
        f"The machine's peaks in this run: {peaks['multiply_adds'] / 1e9:.3g} G multiply-adds/s "
        f"(a square float32 product), {peaks['bytes'] / 1e9:.3g} GB/s (memory).",
        "",
        "Time is the median of a call, with its 20 % and 80 % quantiles. *Ours is* says how many",
        "times faster ours is; below 1 it is slower. *FMA* is the dense form's multiply-adds in",
        "that time, *memory* the bytes that the provider must move, each over the peak: a binary",
        "product and a cache may pass 100 %. *Error* is against float64, in units of plain",
        "PyTorch's, or relative where the provider is lossy: it computes in fewer bits.",
    ]
    for group, cases in _groups(result["cases"]):
        rows = [["case", "provider", "time", "20 % to 80 %", "ours is", "FMA", "memory", "error"]]
        for case in cases:
            rows += _provider_rows(case, peaks)
        lines += ["", f"### {TITLES[group]}", "", markdown_table(rows)]
    return "\n".join(lines) + "\n"


def speed_tables(result: dict[str, Any]) -> str:
    """What the README quotes: how many times faster ours is, for some cases of every group."""
    by_name = {case["name"]: case for case in result["cases"]}
    shown = [by_name[name] for name in README if name in by_name]
    tables = []
    for _, cases in _groups(shown):
        cases = list(cases)
        others = list(
            dict.fromkeys(name for case in cases for name in case["providers"] if name != OURS)
        )
        lossy = {
            name
            for case in cases
            for name, provider in case["providers"].items()
            if provider.get("lossy")
        }
        marks = (f"`{name}`{' (lossy)' if name in lossy else ''}" for name in others)
        rows = [["case", OURS, *(f"over {mark}" for mark in marks)]]
        for case in cases:
            timings = case["providers"]
            ours = timings[OURS]["median"]
            factors = (
                _factor(timings[name]["median"] / ours) if name in timings else ""
                for name in others
            )
            rows.append([case["name"], _seconds(ours), *factors])
        tables.append(markdown_table(rows))
    return "\n\n".join(tables)


def fastest_dense(case: dict[str, Any]) -> str:
    """The name of the fastest provider of plain dense PyTorch."""
    timings = case["providers"]
    return str(min(case["dense"], key=lambda name: timings[name]["median"]))


def write_readme(result: dict[str, Any], readme: Path) -> None:
    """Put ``speed_tables`` between the README's marks."""
    write_between(readme, "speed", speed_tables(result))


def write_between(readme: Path, mark: str, text: str) -> None:
    """Replace what stands between two marks."""
    start, end = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
    before, _, rest = readme.read_text().partition(start)
    _, _, after = rest.partition(end)
    readme.write_text(before + start + text + end + after)


def _groups(cases: list[dict[str, Any]]) -> Iterable[tuple[str, Iterable[dict[str, Any]]]]:
    return groupby(cases, lambda case: case["group"])


def _provider_rows(case: dict[str, Any], peaks: dict[str, float]) -> Rows:
    ours = case["providers"][OURS]["median"]
    rows = []
    for index, (name, timing) in enumerate(case["providers"].items()):
        median = timing["median"]
        fma, memory = (
            "" if amount is None else f"{100 * amount / median / peak:.3g} %"
            for amount, peak in (
                (case["multiply_adds"], peaks["multiply_adds"]),
                (timing["bytes"], peaks["bytes"]),
            )
        )
        rows.append(
            [
                case["name"] if index == 0 else "",
                f"`{name}`",
                _seconds(median),
                f"{_seconds(timing['q20'])} to {_seconds(timing['q80'])}",
                "" if name == OURS else _factor(median / ours),
                fma,
                memory,
                f"{timing['error']:.2g}{' (lossy)' if timing['lossy'] else ''}",
            ]
        )
    return rows


def markdown_table(rows: Rows) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _factor(factor: float) -> str:
    return f"**{factor:.2f}x**" if factor >= 1 else f"{factor:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument(
        "--readme", type=Path, help="write the short tables into this README instead of printing"
    )
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    if options.readme:
        write_readme(result, options.readme)
    else:
        print(render(result), end="")


if __name__ == "__main__":
    main()
