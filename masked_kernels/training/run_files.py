"""The files of a run: a checkpoint, a log, a picture of it."""

import json
from pathlib import Path
from typing import Any

from .checkpoint import load_checkpoint, remove_partial, save_checkpoint, write_atomically
from .curves import plot_curves
from .records import EpochRecord
from .tensorboard import TensorBoard


class RunFiles:
    """A run's folder. Any process may read it, one writes.

    Args:
        folder: made by `open`.
        writes: whether this process does.
        tensorboard: write the log for TensorBoard too.
    """

    def __init__(self, folder: Path, writes: bool = True, tensorboard: bool = False) -> None:
        self.folder, self.writes = folder, writes
        self.tensorboard = tensorboard
        self.board: TensorBoard | None = None
        self.checkpoint, self.lines = folder / "checkpoint.pt", folder / "log.jsonl"

    def open(self, resume: bool) -> dict[str, Any] | None:
        """Make the folder; return its checkpoint, None if there is none.

        Raises:
            FileExistsError: there is one and ``resume`` is False.
            ValueError: it is damaged. No file has been changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            return None
        if not resume:
            raise FileExistsError(f"{self.checkpoint} exists: resume, or choose another folder")
        return load_checkpoint(self.checkpoint)

    def begin(self, records: list[EpochRecord]) -> None:
        """Make the log these records', and remove what a killed run left half-written."""
        if not self.writes:
            return
        remove_partial(self.checkpoint)
        remove_partial(self.lines)
        write_atomically(self.lines, lambda file: file.writelines(map(_json_line, records)))
        if self.tensorboard:
            self.board = TensorBoard(self.folder / "tensorboard", len(records))

    def add(self, record: EpochRecord, state: dict[str, Any]) -> None:
        """Replace the checkpoint, then write the record to the log."""
        if not self.writes:
            return
        save_checkpoint(self.checkpoint, state)
        with self.lines.open("ab") as file:
            file.write(_json_line(record))
        if self.board is not None:
            self.board.add(record)

    def finish(self, records: list[EpochRecord]) -> None:
        """Draw the curves."""
        if self.writes:
            plot_curves(records, self.folder / "curves.png")


def _json_line(record: EpochRecord) -> bytes:
    return json.dumps(record).encode() + b"\n"
