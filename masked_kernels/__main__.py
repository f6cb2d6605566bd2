"""The command line: ``python -m masked_kernels info | selftest | inspect FILE``.

Exit codes: 0 success, 1 a failed self-test or an unreadable file, 2 a wrong command line.
"""

import argparse
import json
import sys
from collections import Counter
from typing import Any

from . import info, selftest
from ._text import table
from .storage import FormatError, inspect_file


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m masked_kernels", description="Masked neural networks: tools."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("info", help="versions, machine, backends and why one is missing")
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="as JSON")
    shape.add_argument("--ops", action="store_true", help="table of ops, backends and dtypes")
    command.set_defaults(run=_info)

    command = commands.add_parser("selftest", help="every available backend on tiny cases")
    command.set_defaults(run=_selftest)

    command = commands.add_parser("inspect", help="sizes and layers of a saved model")
    command.add_argument("file", metavar="FILE", help="written by masked_kernels.save_masked")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_inspect)
    return parser


def _info(options: argparse.Namespace) -> int:
    if options.ops:
        print(info.support_table())
        return 0
    facts = info.gather()
    print(json.dumps(facts, indent=2) if options.json else _info_text(facts))
    return 0


def _info_text(facts: dict[str, Any]) -> str:
    cpu, native = facts["cpu"], facts["native"]
    versions = {name: number or "not installed" for name, number in facts["packages"].items()}
    features = " ".join(cpu["features"] or ()) or "unknown without the native module"
    build = "not built" if native is None else ", ".join(f"{k} {v}" for k, v in native.items())
    rows = [
        ("masked_kernels", facts["masked_kernels"]),
        ("python", facts["python"]),
        *versions.items(),
        ("platform", facts["platform"]),
        ("cpu", f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']}"),
        ("cpu features", features),
        ("kernel isa", cpu["isa"] or "none"),
        ("native build", build),
        *(
            (f"backend {name}", "available" if reason is None else f"unavailable: {reason}")
            for name, reason in facts["backends"].items()
        ),
        *(
            (name, f"{value or 'not set'} ({info.ENVIRONMENT[name]})")
            for name, value in facts["environment"].items()
        ),
    ]
    return table(rows[0], rows[1:])


def _selftest(_: argparse.Namespace) -> int:
    outcomes = []
    for outcome in selftest.run():
        outcomes.append(outcome)
        detail = f": {outcome.detail}" if outcome.detail else ""
        print(f"{outcome.status:8} {outcome.backend:10} {outcome.case}{detail}", flush=True)
    counts = Counter(outcome.status for outcome in outcomes)
    print(", ".join(f"{counts[status]} {status}" for status in ("ok", "failed", "skipped")))
    return 1 if counts["failed"] or not counts["ok"] else 0


def _inspect(options: argparse.Namespace) -> int:
    try:
        summary = inspect_file(options.file)
    except (FormatError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"file": options.file, **summary.to_dict()}, indent=2))
    else:
        print(f"file: {options.file}\n{summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
