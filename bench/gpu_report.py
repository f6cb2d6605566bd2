"""``make gpu-report``: on a machine with a GPU, test and measure the Triton backend there.

Uses what is installed, no network. Writes into one folder ``report.json``, ``report.md`` and
``log.txt``, after each case anew, so that a run that is cut off leaves what it has. A case whose
result is wrong is not timed.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from masked_kernels.backends import why_unavailable

from . import gpu_page, gpu_training
from .gpu_cases import CASES, COPIES, Case, Problem
from .machine import ROOT, machine
from .nets import GPU_NETS

LARGEST_ERROR = 2.0
_FLUSH_BYTES = 1 << 28  # more than any L2 cache
_SAMPLES = 30
_TEST_SECONDS = 270


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if tests passed and no result was wrong, 1 if not, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder to write")
    parser.add_argument("--seconds", type=float, default=120, help="for all cases together")
    parser.add_argument("--cases", default="", help="only cases and networks that this finds")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    options = parser.parse_args(arguments)
    if reason := why_unavailable("triton"):
        print(f"no report: backend 'triton' is unavailable: {reason}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no report: it measures, and the interpreter has nothing to time", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "log.txt").open("w") as log:
        result = report(options, log)
    wrong = any("error" in case for case in result["cases"])
    return 1 if wrong or result["tests"]["exit"] != 0 else 0


def report(options: argparse.Namespace, log: TextIO) -> dict[str, Any]:
    """Run all of it; the returned dict is what ``report.json`` holds."""
    cases = [case for case in CASES if re.search(options.cases, case.name)]
    networks = [net for net in GPU_NETS if re.search(options.cases, net.title)]
    properties = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "machine": {
            **machine("python -m bench.gpu_report"),
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "triton": importlib.import_module("triton").__version__,
        },
        "tests": {"exit": 0, "summary": "not run"} if options.no_tests else run_tests(log),
        "cases": [],
        "training": {},
    }
    deadline = time.monotonic() + options.seconds
    for case in cases:
        if time.monotonic() > deadline:
            result["cases"].append({"name": case.name, "error": "not run: no time was left"})
        else:
            result["cases"].append(measure(case))
        print(json.dumps(result["cases"][-1]), file=log, flush=True)
        write(result, options.out)
    for net in networks:
        result["training"][f"{net.title}, batch {net.batch}"] = gpu_training.measure(net)
        print(json.dumps(result["training"]), file=log, flush=True)
        write(result, options.out)
    return result


def write(result: dict[str, Any], out: Path) -> None:
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "report.md").write_text(gpu_page.render(result))


def run_tests(log: TextIO) -> dict[str, Any]:
    """The op tests on the GPU; not all of them, as every shape compiles kernels of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "--backend=triton", "--device=cuda"]
    command += ["-p", "no:benchmark"]  # it warns beside xdist, and warnings are errors
    command += ["--require-backend=triton", "--pairwise", "python_tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(os.cpu_count() or 1, 14))]
    command += ["-o", "faulthandler_timeout=60"]  # a test that hangs says where
    # Each worker keeps a core busy with compiling, and PyTorch's compiler needs no others.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    tests = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = tests.communicate(timeout=_TEST_SECONDS)
        code = tests.returncode
    except subprocess.TimeoutExpired:
        os.killpg(tests.pid, signal.SIGKILL)  # its workers too: they would share the GPU
        text, _ = tests.communicate()
        code = 124
    print(text, file=log, flush=True)
    return {"exit": code, "summary": text.strip().splitlines()[-1] if text.strip() else ""}


def measure(case: Case) -> dict[str, Any]:
    """Name and providers with their times, or the reason why there are none."""
    try:
        torch.cuda.empty_cache()
        problem = case.build("cuda", "triton")
        if wrong := wrong_results(problem):
            return {"name": case.name, "error": f"wrong results: {wrong}"}
        return {"name": case.name, "baseline": problem.baseline, "providers": times(problem)}
    except Exception as error:  # one case must not cost the others
        return {"name": case.name, "error": f"{type(error).__name__}: {error}"[:500]}


def wrong_results(problem: Problem) -> dict[str, float]:
    """Providers whose error is over the bound, with their error."""
    exact = {name: run for name, run in problem.providers.items() if name not in problem.lossy}
    errors = {name: problem.error(run(0)) for name, run in exact.items()}
    return {name: error for name, error in errors.items() if not error <= LARGEST_ERROR}


def times(problem: Problem) -> dict[str, dict[str, Any]]:
    """Microseconds a call, providers in turns, L2 flushed before each: replayed from a CUDA graph,
    and eager, which includes the launches. A provider that cannot be captured has no graph time.

    Other data is read into L2, not written: what was written has to go back to memory first, and
    that would be counted as the provider's.
    """
    flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
    modes: dict[tuple[str, str], Callable[[int], object]] = {}
    for name, run in problem.providers.items():
        modes[name, "eager"] = run
        if replay := captured(run):
            modes[name, "graph"] = replay
    samples: dict[tuple[str, str], list[float]] = {mode: [] for mode in modes}
    for sample in range(_SAMPLES):
        for mode, run in modes.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            if mode[1] == "eager":
                torch.cuda.synchronize()  # else the launch hides behind the flush
            begin.record()
            run(sample % COPIES)
            end.record()
            end.synchronize()
            samples[mode].append(1e3 * begin.elapsed_time(end))
    result: dict[str, dict[str, Any]] = {name: {} for name in problem.providers}
    for (name, kind), taken in samples.items():
        q20, median, q80 = (round(float(q), 2) for q in np.quantile(taken, (0.2, 0.5, 0.8)))
        result[name][kind] = {"median": median, "q20": q20, "q80": q80}
    return result


def captured(run: Callable[[int], Tensor]) -> Callable[[int], object] | None:
    """``run`` as one CUDA graph a copy, or None if it waits for the host."""
    graphs = []
    try:
        for copy in range(COPIES):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(copy)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(copy)
            graphs.append(graph)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return lambda copy: graphs[copy].replay()


if __name__ == "__main__":
    sys.exit(main())
