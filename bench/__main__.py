"""``python -m bench``: time masked_kernels beside plain PyTorch, and print Markdown tables;
``python -m bench tune``: measure anew which CPU kernel serves which sizes.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import masked_kernels as mk
from masked_kernels.training.checkpoint import write_atomically

from . import tune
from .cases import CASES, QUICK
from .machine import keep_pages, machine, peaks
from .report import render
from .run import WrongResult, run


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 0, or 1 if a provider's result is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["tune"]:
        return tune.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if reason := mk.backends()[options.backend]:
        print(f"error: backend {options.backend!r} is unavailable: {reason}", file=sys.stderr)
        return 1
    cases = [c for c in (QUICK if options.quick else CASES) if re.search(options.cases, c.name)]
    if not cases:
        print(f"error: --cases {options.cases!r} finds none", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    seconds = options.seconds or (0.2 if options.quick else 0.4)
    command = shlex.join(["python", "-m", "bench", *arguments])
    results: list[dict[str, Any]] = []
    report = {
        "machine": machine(command, keep_pages()),
        "peaks": peaks(),
        "backend": options.backend,
        "cases": results,
    }
    try:
        for result in run(cases, options.backend, seconds, options.providers):
            results.append(result)
            print(f"{len(results)}/{len(cases)} {result['name']}", file=sys.stderr, flush=True)
            if options.out:  # after each: some cases take minutes
                _write(report, options.out)
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(report), end="")
    return 0


def _write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--cases", default="", metavar="REGEX", help="only cases whose name it finds"
    )
    parser.add_argument(
        "--providers", default="", metavar="REGEX", help="ours and those whose name it finds"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch and of our kernels")
    parser.add_argument("--backend", default="cpu", choices=tuple(mk.backends()), help="of ours")
    parser.add_argument("--seconds", type=float, help="to time each provider of a case for")
    parser.add_argument("--out", type=Path, help="result file, say bench/results/NAME.json")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter")
    return parser


if __name__ == "__main__":
    sys.exit(main())
