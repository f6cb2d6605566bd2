"""Trainings as processes of examples/train.py: some at once, each continued where it stopped."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..machine import ROOT, machine

TRAIN = (sys.executable, str(ROOT / "examples" / "train.py"))
RESULT, STARTS, OUTPUT = "result.json", "starts.jsonl", "output.txt"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        paper, net, row: name the preset.
        seed: of weights, scores and order.
        flags: of examples/train.py that say what is trained.
        where: flags that do not change what is trained: threads, folders.
    """

    paper: str
    net: str
    row: str
    seed: int
    flags: tuple[str, ...] = ()
    where: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.net}/{self.row} seed {self.seed}"

    def folder(self, root: Path) -> Path:
        return root / self.paper / self.net / self.row / f"seed-{self.seed}"

    def identity(self) -> list[str]:
        """The flags that a finished run must have had."""
        preset = f"{self.paper}/{self.net}/{self.row}"
        return ["--preset", preset, "--seed", str(self.seed), *self.flags]

    def arguments(self, root: Path) -> list[str]:
        return [*self.identity(), "--out", str(self.folder(root)), "--resume", *self.where]

    def result(self, root: Path) -> dict[str, Any] | None:
        """What the run wrote at its end, or None if it has not ended.

        Raises:
            ValueError: it was made with other flags; names both.
        """
        path = self.folder(root) / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        _, *made = result["command"]
        made = made[: made.index("--out")]
        if made != self.identity():
            raise ValueError(
                f"{path} was made with {' '.join(made)}, asked for are "
                f"{' '.join(self.identity())}: choose another --out, or delete that folder"
            )
        return result

    def starts(self, root: Path) -> list[dict[str, Any]]:
        """Machine and commit of each time that the run was started or continued."""
        path = self.folder(root) / STARTS
        return [json.loads(line) for line in path.read_text().splitlines()]


class Process:
    """A run under way. The folder's lock is its process's too: should this process be killed, the
    run goes on, and whoever starts it again meets the lock.
    """

    def __init__(self, run: Run, root: Path, lock: TextIO, train: Sequence[str]) -> None:
        self.run, self.started = run, time.monotonic()
        folder = run.folder(root)
        with lock, (folder / OUTPUT).open("ab") as output:
            self.popen = subprocess.Popen(
                [*train, *run.arguments(root)],
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stop(self) -> None:
        """End it; every completed epoch is kept. Not by SIGINT, which it may have been told to
        ignore: a shell tells its background jobs so.
        """
        self.popen.terminate()
        self.popen.wait()


def train_all(
    runs: Sequence[Run], root: Path, jobs: int, command: str, train: Sequence[str] = TRAIN
) -> Iterator[tuple[Run, int, float]]:
    """Train what has not ended yet, ``jobs`` at once, in this order; yields each run that ends,
    with its exit code and seconds. One that another process is at is left to it, and waited for.
    """
    waiting = deque(run for run in runs if run.result(root) is None)
    busy: list[Process] = []
    try:
        while waiting or busy:
            for _ in range(len(waiting)):
                if len(busy) == jobs:
                    break
                run = waiting.popleft()
                if lock := _lock(run.folder(root)):
                    if run.result(root) is None:
                        _note_start(run.folder(root), command)
                        busy.append(Process(run, root, lock, train))
                    else:  # by another process, meanwhile
                        lock.close()
                        yield run, 0, 0.0
                else:
                    waiting.append(run)
            time.sleep(POLL_SECONDS)
            for process in [each for each in busy if each.popen.poll() is not None]:
                busy.remove(process)
                yield process.run, process.popen.returncode, process.seconds()
    finally:
        for process in busy:
            process.stop()


def _lock(folder: Path) -> TextIO | None:
    """The folder's lock, held until it is closed, or None if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _note_start(folder: Path, command: str) -> None:
    facts = machine(command)
    del facts["threads"]  # this process's; the run tells its own
    with (folder / STARTS).open("a") as file:
        print(json.dumps(facts), file=file)
