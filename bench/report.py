"""A result as Markdown: ``python -m bench.report bench/results/NAME.json``."""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

OURS = "ours"


def render(result: dict[str, Any]) -> str:
    """The machine in one line, then a table for each set of providers; wins and losses alike."""
    machine = result["machine"]
    commit = f"{(machine['commit'] or 'unknown')[:9]}{' (dirty)' if machine['dirty'] else ''}"
    facts = (
        machine["cpu"],
        f"{machine['threads']} of {machine['cores']} cores",
        machine["isa"] or "no native code",
        f"torch {machine['torch']}",
        f"backend {result['backend']}",
        f"commit {commit}",
        machine["date"][:10],
    )
    lines = [
        f"{', '.join(facts)}: `{machine['command']}`",
        "",
        "Median time of a call (20 % to 80 % quantile). The last columns say how many times faster",
        "than each provider ours is; below 1 it is slower.",
    ]
    for providers, cases in groupby(result["cases"], lambda case: tuple(case["providers"])):
        lines += ["", *_table(providers, list(cases))]
    return "\n".join(lines) + "\n"


def speed_tables(result: dict[str, Any]) -> str:
    """What the README quotes: how many times faster ours is, a table for each set of providers."""
    tables = []
    for providers, cases in groupby(result["cases"], lambda case: tuple(case["providers"])):
        others = [name for name in providers if name != OURS]
        rows = [["case", "ours", *(f"over `{name}`" for name in others)]]
        rows.append(["---"] * len(rows[0]))
        for case in cases:
            timings = case["providers"]
            ours = timings[OURS]["median"]
            factors = (_factor(timings[name]["median"] / ours) for name in others)
            rows.append([case["name"], _time(timings[OURS]).split(" (")[0], *factors])
        tables.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(tables)


def _table(providers: tuple[str, ...], cases: list[dict[str, Any]]) -> list[str]:
    others = [name for name in providers if name != OURS] if OURS in providers else []
    header = ["case", *(f"`{name}`" for name in providers), *(f"over `{name}`" for name in others)]
    rows = [header, ["---"] * len(header)]
    for case in cases:
        timings = case["providers"]
        rows.append(
            [
                case["name"],
                *(_time(timings[name]) for name in providers),
                *(_factor(timings[name]["median"] / timings[OURS]["median"]) for name in others),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _time(timing: dict[str, float]) -> str:
    unit, scale = next(
        (u, s)
        for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
        if timing["median"] * s >= 1 or u == "µs"
    )
    median, low, high = (f"{timing[key] * scale:.3g}" for key in ("median", "q20", "q80"))
    return f"{median} {unit} ({low} to {high})"


def _factor(factor: float) -> str:
    return f"**{factor:.2f}x**" if factor >= 1 else f"{factor:.2f}x"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("result", type=Path)
    print(render(json.loads(parser.parse_args().result.read_text())), end="")
