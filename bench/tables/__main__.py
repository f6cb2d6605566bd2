"""``python -m bench.tables pemn``: train the nets and rows of PEMN's tables and write our numbers
beside the paper's. Flags after ``--`` go to examples/train.py as they are.

Ended runs are not repeated and stopped ones continue, so the same command can be given again after
a Ctrl-C or a kill.
"""

import argparse
import contextlib
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..machine import ROOT
from . import figure, page
from .collect import collect
from .pemn import CPU_NETS, PAPER, RATE_ROWS, ROWS, SCHEDULES
from .runs import OUTPUT, TRAIN, Run, train_all

NO_TRAIN = "--no-train"


def main(arguments: list[str] | None = None, train: Sequence[str] = TRAIN) -> int:
    """Exit code: 0, 1 if a run failed, 2 if the arguments fit no run, 130 if stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, train_flags = _parser().parse_args(arguments[:split]), arguments[split + 1 :]
    shown = [argument for argument in arguments if argument != NO_TRAIN]
    command = shlex.join(["python", "-m", "bench.tables", *shown])
    try:
        runs = _runs(options, train_flags)
        failed = [] if options.no_train else _train(runs, options.out, options.jobs, command, train)
        result = collect(runs, options.out, command)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; give the same command again to go on", file=sys.stderr)
        return 130
    if options.name:
        results = ROOT / "bench" / "results" / f"{options.name}.json"
        results.write_text(json.dumps(result, indent=1) + "\n")
        docs = ROOT / "docs" / "results"
        figure.write(result, docs / f"{options.name}.svg")
        page.write(result, docs / f"{options.name}.md")
    print(page.tables(result))
    return 1 if failed else 0


def _runs(options: argparse.Namespace, train_flags: Sequence[str]) -> list[Run]:
    """Seed by seed, so that whole tables can be made early."""
    schedule = SCHEDULES[options.schedule]
    if missing := [net for net in options.nets if net not in schedule]:
        raise ValueError(
            f"--schedule {options.schedule} is for {', '.join(schedule)}, got {', '.join(missing)}"
        )
    where = ("--data", str(options.data), "--threads", str(options.threads), "--quiet")
    return [
        Run(options.paper, net, row, seed, (*schedule[net], *train_flags), where)
        for seed in range(options.seeds)
        for net in options.nets
        for row in options.rows
    ]


def _train(
    runs: Sequence[Run], out: Path, jobs: int, command: str, train: Sequence[str]
) -> list[Run]:
    """Train with a line for each run that ends; returns those that failed."""
    todo = sum(run.result(out) is None for run in runs)
    print(f"{len(runs)} runs, {len(runs) - todo} of them done, {jobs} at once", flush=True)
    failed, start = [], time.monotonic()
    with (
        _terminate_as_interrupt(),
        contextlib.closing(train_all(runs, out, jobs, command, train)) as ends,
    ):
        for ended, (run, code, seconds) in enumerate(ends, 1):
            if code:
                failed.append(run)
                outcome = f"FAILED with code {code}, see {run.folder(out) / OUTPUT}"
            else:
                accuracy = (run.result(out) or {})["test_accuracy"]
                outcome = f"{100 * accuracy:.2f} % in {seconds:.0f} s"
            left = (time.monotonic() - start) / ended * (todo - ended)
            print(f"[{ended}/{todo}] {run}: {outcome}; {left / 60:.0f} minutes left", flush=True)
    return failed


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM is KeyboardInterrupt, so that the runs are stopped too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paper", choices=("pemn",))
    nets, rows = tuple(PAPER), (*ROWS, *RATE_ROWS)
    parser.add_argument(
        "--nets", nargs="+", choices=nets, default=CPU_NETS, metavar="NET", help=_names(nets)
    )
    parser.add_argument(
        "--rows", nargs="+", choices=rows, default=ROWS, metavar="ROW", help=_names(rows)
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (%(default)s)")
    parser.add_argument(
        "--schedule", choices=tuple(SCHEDULES), default="paper", help="(%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="of runs (%(default)s)")
    parser.add_argument(
        "--name", help="write docs/results/NAME.md and .svg, and bench/results/NAME.json"
    )
    parser.add_argument(NO_TRAIN, action="store_true", help="only write what there is")
    return parser


def _names(names: Sequence[str]) -> str:
    return f"of {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main())
