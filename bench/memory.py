"""``python -m bench.memory``: the peak of memory in a training step of PEMN's networks on the CPU,
masked, dense and as published, in all and per masked weight.

Each is measured in a process of its own, on the paper's batch (or what the case of the training
step takes) and on two images, where weights outweigh activations. *Tensors* are the model's state
and the largest sum of what PyTorch's allocator has handed out during two steps, gradients
included, by the profiler's records: exact, but blind to scratch memory that a library or kernel
takes for itself. *Process* is by how much the process's peak resident size (VmHWM, set back after
the model was built) is above its size before the model was built: all memory, but of the C
allocator's whims too.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .machine import ROOT, machine
from .nets import (
    CLASSES,
    IMAGE,
    NETS,
    RECIPES,
    RECOMPUTED,
    TOYS,
    Net,
    build,
    masked_weights,
    training_step,
    ways,
)
from .report import markdown_table

FEW = 2
"""Images that leave the weights to dominate."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print Markdown, write JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    titles = tuple(net.title for net in NETS)
    parser.add_argument("--nets", nargs="+", choices=titles, default=titles, metavar="NET")
    parser.add_argument("--few", action="store_true", help="two images only, which takes minutes")
    parser.add_argument("--threads", type=int, default=2, help="of torch and of our kernels")
    parser.add_argument("--out", type=Path, help="result file, say bench/results/NAME.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # this very process: what to do
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        title, way, batch = options.one
        print(json.dumps(measure(NETS[titles.index(title)], way, int(batch))))
        return 0
    result: dict[str, Any] = {
        "machine": machine(shlex.join(["python", "-m", "bench.memory", *arguments])),
        "nets": {},
    }
    for net in (net for net in NETS if net.title in options.nets):
        result["nets"][net.title] = {
            "masked_weights": masked_weights(net),
            "batches": {
                batch: {way: _elsewhere(net, way, batch, options.threads) for way in ways(net)}
                for batch in ((FEW,) if options.few else (net.cpu_batch, FEW))
            },
        }
        print(net.title, file=sys.stderr, flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(render(json.loads(json.dumps(result))), end="")
    return 0


def measure(net: Net, way: str, batch: int) -> dict[str, int]:
    """Bytes at the peak of a step, by ``tensors`` and by ``process``; for a fresh process."""
    for toy in TOYS:  # what libraries load and set up with the first call is nobody's
        training_step(build(toy, "dense eager"), torch.zeros(1, dtype=torch.int64), "auto")(
            torch.randn(1, *IMAGE)
        )
    before = _status("VmRSS")
    model = build(net, way)
    labels = torch.randint(CLASSES, (batch,))
    backend = "cpu" if way in RECIPES else "auto"
    step = training_step(model, labels, backend, recompute=way == RECOMPUTED)
    x = torch.randn(batch, *IMAGE)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    for _ in range(2):
        step(x)
    process = _status("VmHWM") - before
    model.zero_grad()
    state = state_bytes(model)
    return {"tensors": state + allocated_peak(lambda: (step(x), step(x))), "process": process}


def state_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, shared memory once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def allocated_peak(run: Callable[[], object]) -> int:
    """The largest sum of bytes that PyTorch's CPU allocator hands out during ``run``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == 0
    ]
    return max(itertools.accumulate(size for _, size in sorted(changes, key=lambda c: c[0])))


def render(result: dict[str, Any]) -> str:
    """Markdown: a line for each network, batch and way; differences are from ``dense eager``."""
    rows = [
        [
            "network",
            "batch",
            "",
            "tensors, MB",
            "process, MB",
            "tensors, bytes a masked weight",
            "over dense's",
        ]
    ]
    for title, net in result["nets"].items():
        weights = net["masked_weights"]
        for batch, found in net["batches"].items():
            for way, peak in found.items():
                more = (peak["tensors"] - found["dense eager"]["tensors"]) / weights
                rows.append(
                    [
                        title,
                        batch,
                        f"`{way}`",
                        f"{peak['tensors'] / 1e6:,.1f}",
                        f"{peak['process'] / 1e6:,.1f}",
                        f"{peak['tensors'] / weights:,.1f}",
                        f"{more:+,.1f}",
                    ]
                )
    return markdown_table(rows) + "\n"


def _elsewhere(net: Net, way: str, batch: int, threads: int) -> dict[str, int]:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", "--threads", str(threads)]
    command += ["--one", net.title, way, str(batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _status(name: str) -> int:
    """A size of this process, from Linux, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    sys.exit(main())
