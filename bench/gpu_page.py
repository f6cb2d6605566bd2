"""``python -m bench.gpu_page``: Markdown of what ``bench.gpu_report`` measured, all of it or a
short form for the README.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import write_between


def render(result: dict[str, Any]) -> str:
    """Markdown: every provider's median, and ours over each; below 1 is slower."""
    facts = result["machine"]
    lines = [
        f"# {facts['gpu']}",
        "",
        f"torch {facts['torch']}, Triton {facts['triton']}, CUDA {facts['cuda']}, "
        f"commit {facts['commit']}{' with changes' if facts['dirty'] else ''}, {facts['date']}. "
        "bfloat16, medians in µs, L2 flushed, operands rotated.",
        "",
        f"Tests on the GPU: {result['tests']['summary']} (exit code {result['tests']['exit']})",
        "",
        "| case | provider | graph | eager | ours is (graph) | ours is (eager) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        if "error" in case:
            lines.append(f"| {case['name']} | {case['error']} | | | | |")
            continue
        ours = case["providers"]["ours"]
        for name, taken in case["providers"].items():
            cells = [_median(taken, kind) for kind in ("graph", "eager")]
            cells += [_ratio(taken, ours, kind) for kind in ("graph", "eager")]
            lines.append(f"| {case['name']} | {name} | {' | '.join(cells)} |")
    if result["training"]:
        lines += [
            "",
            "A training step in ms, launched by the host and as a CUDA graph; peak of what is "
            "allocated, and of it per masked weight:",
            "",
            "| network | | eager | over dense | graph | over dense | peak MB | bytes a weight "
            "| over dense's |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for net, taken in result["training"].items():
        dense = taken.get("dense eager", {})
        for way, found in taken.items():
            cells = [found["error"]] if "error" in found else _step_cells(found, dense)
            lines.append(f"| {net} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _step_cells(found: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    cells = []
    for kind in ("median", "graph"):
        cells.append(f"{found[kind]:.2f}" if kind in found else "-")
        both = kind in found and kind in dense
        cells.append(f"{found[kind] / dense[kind]:.3f}x" if both else "-")
    more = found["peak_bytes_per_weight"] - dense.get("peak_bytes_per_weight", float("nan"))
    cells += [f"{found['peak_bytes'] / 1e6:.0f}", f"{found['peak_bytes_per_weight']:.1f}"]
    return [*cells, f"{more:+.1f}"]


def _median(taken: dict[str, Any], kind: str) -> str:
    return f"{taken[kind]['median']:.1f}" if kind in taken else "-"


def _ratio(taken: dict[str, Any], ours: dict[str, Any], kind: str) -> str:
    if taken is ours or kind not in taken or kind not in ours:
        return "-"
    return f"{taken[kind]['median'] / ours[kind]['median']:.2f}x"


def short(result: dict[str, Any]) -> str:
    """How many times faster ours is, by CUDA graphs where both have one; below 1 is slower."""
    lines = ["| case | ours, µs | times faster than |", "| --- | --- | --- |"]
    for case in result["cases"]:
        if "error" not in case:
            ours = case["providers"]["ours"]
            kind = "graph" if "graph" in ours else "eager"
            lines.append(f"| {case['name']} | {_median(ours, kind)} | {_factors(case)} |")
    lines += [
        "",
        "| training step, bfloat16 | of a dense step, as a CUDA graph | launched by the host "
        "| of the published layer's |",
        "| --- | --- | --- | --- |",
    ]
    for net, taken in result["training"].items():
        ours, dense = taken.get("ours", {}), taken.get("dense eager", {})
        cells = [_share(ours, dense, "graph"), _share(ours, dense, "median")]
        cells.append(_share(ours, taken.get("published layer", {}), "median"))
        lines.append(f"| {net} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _factors(case: dict[str, Any]) -> str:
    def each() -> Iterator[str]:
        ours = case["providers"]["ours"]
        for name, taken in case["providers"].items():
            both = [kind for kind in ("graph", "eager") if kind in taken and kind in ours]
            if taken is not ours and both:
                factor = taken[both[0]]["median"] / ours[both[0]]["median"]
                eager = " (launched by the host)" if both[0] == "eager" else ""
                text = f"{factor:.2f}x"
                yield f"`{name}` {f'**{text}**' if factor >= 1 else text}{eager}"

    return ", ".join(each())


def _share(ours: dict[str, Any], other: dict[str, Any], kind: str) -> str:
    return f"{ours[kind] / other[kind]:.2f}" if kind in ours and kind in other else "-"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_page", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--steps", type=Path, help="a result whose training steps are shown too")
    parser.add_argument("--readme", type=Path, help="write the short form into this README")
    parser.add_argument("--cases", default="", help="only cases that this finds")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    result["cases"] = [case for case in result["cases"] if re.search(options.cases, case["name"])]
    if options.steps:
        result["training"] |= json.loads(options.steps.read_text())["training"]
    if options.readme:
        write_between(options.readme, "gpu", short(result))
    else:
        print(render(result), end="")


if __name__ == "__main__":
    main()
