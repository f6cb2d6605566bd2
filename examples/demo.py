"""The whole job on real images in minutes: train, pack, save, reload, compare, time.

    python examples/demo.py

Two ConvMixers learn scikit-learn's handwritten digits with the same settings: one trains its
weights, the other a mask over a short repeated random vector. The masked one is packed and saved;
a new process loads the file and must predict the same. Then both are timed side by side, and
demo/report.html shows it all. The steps are examples/train.py and examples/predict.py, run as
anyone would run them.
"""

import argparse
import json
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import curve, digits, write_report
from safetensors.torch import load_file
from torch import nn

import masked_kernels as mk
from masked_kernels.training import NETS, Normalize, Splits, load_splits

EXAMPLES = Path(__file__).parent
NET = NETS["small/digits"]


def step(text: str) -> None:
    print(f"\n{text}", flush=True)


def example(script: str, *arguments: str | Path) -> None:
    """Run an example in a process of its own."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    print("$ python", f"examples/{script}", *map(str, arguments), flush=True)
    subprocess.run(command, check=True)


def read_run(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return a run's result.json and the lines of its log."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return json.loads((folder / "result.json").read_text()), records


def load_dense(path: Path, data: Splits) -> nn.Module:
    """Rebuild the plain model from examples/train.py's file."""
    model = mk.models.create_model(
        NET.model, **NET.model_args, num_classes=len(data.classes), in_channels=data.channels
    )
    model.load_state_dict(load_file(path))
    return model.eval()


def interleaved_medians(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each call, taken in turns so that all meet the same machine."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def time_models(
    models: dict[str, nn.Module], images: torch.Tensor, seconds: float
) -> list[dict[str, Any]]:
    """Return, for batches of 1 and 64, the median seconds per image of each model."""
    rows = []
    for batch in (1, 64):
        inputs = images[:batch]
        calls = {name: lambda m=model, x=inputs: m(x) for name, model in models.items()}
        medians = interleaved_medians(calls, seconds)
        rows.append({"batch": batch, **{name: t / batch for name, t in medians.items()}})
    return rows


def layer_rows(summary: Any, records: list[Any]) -> list[dict[str, Any]]:
    """Return a row per masked layer: shape, density, bits changed in the first and last epoch."""
    return [
        {
            "name": layer.name,
            "shape": " \N{MULTIPLICATION SIGN} ".join(map(str, layer.shape)),
            "density": layer.density,
            "first_flips": records[0]["layers"][layer.name]["flip_rate"],
            "last_flips": records[-1]["layers"][layer.name]["flip_rate"],
        }
        for layer in summary.layers
    ]


def gather(
    folder: Path,
    data: Splits,
    model: nn.Module,
    packed: Any,
    trained: Any,
    times: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return what the page shows."""
    dense, dense_records = read_run(folder / "dense")
    masked, masked_records = read_run(folder / "masked")
    summary = mk.summary(model)
    sizes = masked["sizes"]
    parts = {
        "mask, one bit a weight": sizes["mask_bytes"],
        "prototype": sizes["value_bytes"],
        "batch norm": sizes["other_bytes"],
        "names, shapes, checksum": sizes["header_bytes"],
    }
    pictures = digits(
        data.test.images[:, 0].numpy(),
        [data.classes[label] for label in data.test.labels],
        [data.classes[guess] for guess in packed.argmax(1)],
    )

    def outcome(result: dict[str, Any]) -> dict[str, Any]:
        return {
            "accuracy": result["test_accuracy"],
            "val_accuracy": result["val_accuracy"],
            "best_epoch": result["best_epoch"],
            "seconds": result["train_seconds"],
            "file_bytes": result["sizes"]["file_bytes"],
        }

    labels = data.test.labels.numpy()
    return {
        "dense": outcome(dense),
        "masked": outcome(masked),
        "packed": {
            "accuracy": float((packed.argmax(1) == labels).mean()),
            "file_bytes": sizes["file_bytes"],
        },
        "weights": sizes["weights"],
        "period": sizes["values"],
        "paper_ratio": sizes["paper_ratio"],
        "parts": parts,
        "test_images": len(packed),
        "agreeing": int((packed.argmax(1) == trained.argmax(1)).sum()),
        "same": bool((packed.argmax(1) == trained.argmax(1)).all()),
        "largest_difference": float(np.abs(packed - trained).max()),
        "accuracy_svg": curve(
            dense_records, masked_records, "train_accuracy", "val_accuracy", factor=100
        ),
        "loss_svg": curve(dense_records, masked_records, "train_loss", "val_loss", bottom=0),
        "times": times,
        "layers": layer_rows(summary, masked_records),
        "backend": ", ".join(sorted({layer.backend for layer in summary.layers})),
        "pictures": random.Random(0).sample(pictures, 60),
        "mistakes": [digit for digit in pictures if not digit.right],
        "model": ", ".join(f"{key} {value}" for key, value in masked["model_args"].items()),
        "settings": masked["settings"],
        "ratio": masked["recipe"]["ratio"],
        "images": masked["images"],
        "machine": masked["machine"],
        "command": shlex.join(["python", "examples/demo.py", *sys.argv[1:]]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (%(default)s)")
    parser.add_argument("--epochs", type=int, default=NET.settings.epochs)
    parser.add_argument("--ratio", type=float, default=1e-2, help="of random_padding")
    parser.add_argument("--seconds", type=float, default=4.0, help="timing, per batch size")
    args = parser.parse_args()
    start = time.perf_counter()
    dense_run, masked_run = args.out / "dense", args.out / "masked"
    for folder in (dense_run, masked_run):
        shutil.rmtree(folder, ignore_errors=True)

    step("1/5 Train the plain model")
    common = ("--dataset", "digits", "--epochs", args.epochs)
    example("train.py", *common, "--dense", "--out", dense_run)
    step("2/5 Train the masked model, pack it, save it")
    recipe = ("--recipe", "random_padding", "--ratio", args.ratio)
    example("train.py", *common, *recipe, "--out", masked_run)
    step("3/5 Load the file in a new process and predict the test images")
    packed_file = masked_run / "model.safetensors"
    example("predict.py", packed_file, "--out", args.out / "packed_logits.npy")
    data = load_splits("digits")
    trained = np.load(masked_run / "test_logits.npy")
    packed = np.load(args.out / "packed_logits.npy")
    agreeing = int((trained.argmax(1) == packed.argmax(1)).sum())
    print(f"{agreeing} of {len(packed)} predictions equal the trained model's")

    step("4/5 Time dense and packed, in turns")
    models = {
        "dense": load_dense(dense_run / "model.safetensors", data),
        "packed": mk.load_masked(packed_file).eval(),
    }
    images = Normalize(data.mean, data.std)(data.test.images)
    times = time_models(models, images, args.seconds)
    for row in times:
        print(
            f"batch {row['batch']:2}: dense {1e6 * row['dense']:7.1f} µs, "
            f"packed {1e6 * row['packed']:7.1f} µs per image ({row['dense'] / row['packed']:.2f} x)"
        )

    step("5/5 Write the report")
    path = args.out / "report.html"
    write_report(path, gather(args.out, data, models["packed"], packed, trained, times))
    print(f"{path}  ({time.perf_counter() - start:.0f} s in all)")
    return 0 if agreeing == len(packed) else 1


if __name__ == "__main__":
    sys.exit(main())
