"""Train the plain model and every recipe of PEMN's comparison, and write a table of the results.

    python examples/recipes_table.py --table docs/results/cifar10_cpu.md -- \\
        --dataset cifar10 --data data/cifar10 --download --preset small/cifar10

Everything after ``--`` goes to examples/train.py as it is. Runs that are complete are not repeated
and a run that was stopped continues, so the same command can be given again after a Ctrl-C.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).with_name("train.py")

RUNS: dict[str, list[str]] = {
    "dense": ["--dense"],
    "edge_popup": ["--recipe", "edge_popup"],
    "max_layer_padding": ["--recipe", "max_layer_padding"],
    **{
        f"random_padding {ratio}": ["--recipe", "random_padding", "--ratio", ratio]
        for ratio in ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5")
    },
}


def train_all(folder: Path, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Run examples/train.py for each recipe; return the content of each result.json."""
    results = {}
    for number, (name, recipe) in enumerate(RUNS.items(), 1):
        out = folder / name.replace(" ", "-")
        if not (out / "result.json").exists():
            print(f"[{number}/{len(RUNS)}] {name}", flush=True)
            own = [*recipe, "--out", str(out), "--resume"]
            subprocess.run([sys.executable, str(TRAIN), *arguments, *own], check=True)
        results[name] = json.loads((out / "result.json").read_text())
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table, a line per run."""
    lines = [
        "| run | frozen values | test accuracy, % | validation accuracy, % | best epoch "
        "| file, bytes | dense / file |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    dense_bytes = results["dense"]["sizes"]["file_bytes"]
    for name, result in results.items():
        size = result["sizes"]["file_bytes"]
        values = f"{result['sizes']['values']:,}" if "values" in result["sizes"] else ""
        lines.append(
            f"| {name} | {values} | {100 * result['test_accuracy']:.2f} "
            f"| {100 * result['val_accuracy']:.2f} | {result['best_epoch']} | {size:,} "
            f"| {dense_bytes / size:.1f} |"
        )
    return "\n".join(lines)


def page(results: dict[str, dict[str, Any]], commit: str) -> str:
    """Return the Markdown page: what was run, on what, and the table."""
    any_run = results["dense"]
    train, val, test = any_run["images"]
    settings, machine = any_run["settings"], any_run["machine"]
    model = ", ".join(f"{key} {value}" for key, value in any_run["model_args"].items())
    command = shlex.join(["python", "examples/recipes_table.py", *sys.argv[1:]])
    return f"""# {any_run["dataset"]}: recipes compared

- {any_run["model"]}, {model}
- {train:,} training, {val:,} validation and {test:,} test images
- {settings["epochs"]} epochs, batches of {settings["batch_size"]}, {settings["optimizer"]},
  largest rate {settings["lr"]:g}, seed {settings["seed"]}

The weights of the epoch with the best validation accuracy were tested, once. These numbers compare
the recipes with one another under equal settings; the paper's are of its own model and length.

{table(results)}

The dense file holds fp32 weights and norms; the others hold packed bits, norms and the frozen
values: random weights or a prototype, stored and not regenerated from a seed. Ratios that give the
same number of frozen values are the same run twice.

    {command}

Commit {commit}; torch {machine["torch"]}, {machine["cpu"]}, threads: {machine["threads"]}.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="%(default)s")
    parser.add_argument("--table", type=Path, metavar="MD", help="write the page there")
    parser.add_argument("train_arguments", nargs="*", metavar="-- ARGUMENT")
    args = parser.parse_args()
    results = train_all(args.out, args.train_arguments)
    print(table(results))
    if args.table is not None:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], check=True, capture_output=True, text=True
        ).stdout.strip()
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(page(results, commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
