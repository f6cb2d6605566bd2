"""The Markdown page of a result."""

import shlex
from pathlib import Path
from typing import Any

from ..report import markdown_table
from .collect import (
    file_bytes,
    formula_size,
    nets_of,
    ours,
    paper,
    rank_correlation,
)
from .pemn import Accuracy

NOTES = ("<!-- notes -->\n", "<!-- /notes -->\n")
"""What is between them in an existing page is written by hand, and kept."""

HEADER = [
    "row",
    "frozen values",
    "paper, test %",
    "ours, test %",
    "ours, validation %",
    "seeds",
    "size by the paper's formula",
    "file, bytes",
    "file / dense file",
]
CHOSEN = {
    "validation": "of the epoch with the best validation accuracy: the validation images are taken "
    "from the training images, and the test images are looked at once, at the end.",
    "test": "the best of any epoch, as in the paper: the test images chose it.",
}
PROTOCOL = """\
*Ours* is the test accuracy, mean ± standard deviation over seeds, {chosen}
*Paper* is PEMN's mean ± standard deviation of 3 repeats, where it prints them, of the best test
accuracy of any epoch after its full schedule; a number without ± is from a figure or from a table
without them. *Frozen values* are the random numbers in the file, fp32. *Size by the paper's
formula* is `(N + 32 V) / 32 N` for `N` masked weights and `V` values, and three words a kept weight
for pruned rows; no norms, no biases. *File* is what is really written: bits, values, norms, header;
it is compared with the dense network's, norms included. Pruned rows name the share of storage that
is saved (`random-90`) or of weights that is removed (`random-90-rate`)."""
GPU = """\
## The paper's schedule

The presets' own schedule is the paper's: 100 epochs in batches of 512 for ConvMixer and of 256 for
ResNet, 200 epochs in batches of 256 for ViT, with its augmentations. On a machine with a GPU, with
CIFAR-10 in `data/cifar10` (or `--data`):

    python -m bench.tables pemn --nets {nets} --name pemn_cifar10_gpu -- --channels-last

A tenth of the training images choose the epoch; `--val-size 0` behind `--` is the paper's protocol.
The command finds the GPU by itself, may be stopped at any time, and goes on when given again.
`--rows`, `--nets` and `--seeds 1` make a smaller start; `--jobs` puts several runs on one GPU."""


def tables(result: dict[str, Any]) -> str:
    """A table for each net, a line for each row."""
    return "\n\n".join(f"## {net}\n\n{_table(cells)}" for net, cells in nets_of(result).items())


def render(result: dict[str, Any], name: str, notes: str = "") -> str:
    """The page; its figure is ``name``.svg beside it."""
    nets = nets_of(result)
    first = next(iter(nets.values()))[0]["runs"][0]
    train, validation, test = first["images"]
    facts = result["machine"]
    machine = f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}"
    if gpu := first["machine"].get("gpu"):
        machine = f"{gpu}, {machine}"
    runs = [run for cells in nets.values() for cell in cells for run in cell["runs"]]
    commits = sorted({commit[:9] for run in runs for commit in run["commits"] if commit})
    hours = sum(run["train_seconds"] for run in runs) / 3600
    parts = [
        f"# {first['dataset']}: PEMN's tables",
        f"- {train:,} training, {validation:,} validation and {test:,} test images\n"
        + "\n".join(_schedule(net, cells, result["flags"][net]) for net, cells in nets.items()),
        "`python -m bench.tables` made this page, figure and tables:\n\n    "
        + facts["command"]
        + f"\n\n{len(runs)} runs, {hours:.1f} hours of training; {machine}, threads of a run: "
        f"{first['machine']['threads']}; torch {facts['torch']}; commit {', '.join(commits)}.",
        PROTOCOL.format(chosen=CHOSEN[first["chosen_by"]]),
        f"{NOTES[0]}{notes}{NOTES[1]}",
        f"![Accuracy by number of frozen values and by size]({name}.svg)",
        *(f"## {net}\n\n{_order(cells)}{_table(cells)}" for net, cells in nets.items()),
        GPU.format(nets=" ".join(nets)),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write(result: dict[str, Any], path: Path) -> None:
    """Write the page; notes that are in the old one stay."""
    notes = ""
    if path.exists():
        _, _, rest = path.read_text().partition(NOTES[0])
        notes, _, _ = rest.partition(NOTES[1])
    path.write_text(render(result, path.stem, notes))


def _schedule(net: str, cells: list[dict[str, Any]], flags: list[str]) -> str:
    """What the runs of a net had in common, as they wrote it themselves."""
    run = cells[0]["runs"][0]
    settings, changed = run["settings"], run["model_args"]
    but = "".join(f", **{name} {value} instead of the paper's**" for name, value in changed.items())
    return (
        f"- {net}{but}: {settings['epochs']} epochs in batches of {settings['batch_size']}, "
        f"{settings['optimizer']}, largest rate {settings['lr']:g}, {settings['schedule']}, "
        f"weight decay {settings['weight_decay']:g}, augmentation {settings['augment']}"
        + (f" (`{shlex.join(flags)}`)" if flags else ", the preset's")
    )


def _order(cells: list[dict[str, Any]]) -> str:
    if (found := rank_correlation(cells)) is None:
        return ""
    correlation, count = found
    return (
        f"The order of the {count} masked and pruned rows that the paper has too: Spearman's rank "
        f"correlation with the paper's is {correlation:.2f}.\n\n"
    )


def _table(cells: list[dict[str, Any]]) -> str:
    dense = next((file_bytes(cell) for cell in cells if cell["row"] == "dense"), None)
    rows = [HEADER]
    for cell in cells:
        sizes, size = cell["runs"][0]["sizes"], file_bytes(cell)
        rows.append(
            [
                cell["row"],
                f"{sizes['values']:,}" if "values" in sizes else "",
                _accuracy(paper(cell)),
                _accuracy(ours(cell)),
                _accuracy(ours(cell, "val_accuracy")),
                str(len(cell["runs"])),
                f"{100 * formula_size(cell):.2f} %",
                f"{size:,}",
                f"{100 * size / dense:.1f} %" if dense else "",
            ]
        )
    return markdown_table(rows)


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    spread = "" if accuracy.std is None else f" ± {accuracy.std:.2f}"
    return f"{accuracy.mean:.2f}{spread}"
