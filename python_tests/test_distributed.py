"""Several processes: data in shares, and, in real jobs of torchrun (Gloo), all the rest.

What the jobs check is in distributed_worker.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train
from distributed_worker import run_arguments

from masked_kernels.training import ImageDataset, batches, seeded_generator
from masked_kernels.training.checkpoint import load_checkpoint
from masked_kernels.training.data import batch_lengths
from masked_kernels.training.launch import open_world

TESTS = Path(__file__).parent
WORKER = TESTS / "distributed_worker.py"
TIME_LIMIT = 300


def start(processes: int, *arguments: str | Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, f"--nproc-per-node={processes}", str(WORKER), *map(str, arguments)],
        env=environment,
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and all output; a job that hangs is killed."""
    try:
        output, _ = job.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return job.returncode, output


@pytest.mark.parametrize("count", [50, 48, 47, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_epoch_is_every_image_once_and_every_process_has_a_share(count: int, size: int) -> None:
    images = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    dataset = ImageDataset(images, torch.arange(count))
    shares = [
        list(batches(dataset, 16, seeded_generator(3, 0), rank, size)) for rank in range(size)
    ]
    alone = [batch for batch, _ in batches(dataset, 16, seeded_generator(3, 0))]
    seen = torch.cat([batch.labels for of_rank in shares for batch, _ in of_rank])
    assert seen.sort().values.tolist() == list(range(count))
    for of_ranks in zip(*shares, strict=True):  # as many batches on each
        sizes = [len(batch) for batch, _ in of_ranks]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert {whole for _, whole in of_ranks} == {sum(sizes)}
    first = torch.cat([of_rank[0][0].labels for of_rank in shares])
    assert set(first.tolist()) == set(alone[0].labels.tolist())  # the batch of one process


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(50, 1, [16, 16, 16, 2]), (50, 2, [16, 16, 16, 2]), (50, 3, [16, 16, 18]), (7, 3, [7])],
)
def test_a_rest_too_small_to_share_joins_the_last_batch(
    count: int, size: int, expected: list[int]
) -> None:
    assert batch_lengths(count, 16, size) == expected


@pytest.mark.parametrize(("count", "batch_size"), [(2, 16), (50, 2)])
def test_a_batch_without_an_image_for_each_process_is_refused(count: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: got {batch_size} of {count} images"):
        batch_lengths(count, batch_size, 3)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [("ddp", "got 'ddp', expected none without torchrun"), ("dp", "got 'dp', expected one of")],
)
def test_a_world_must_suit_how_the_process_was_started(parallel: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), open_world(parallel, "cpu"):
        pass


@pytest.mark.slow
def test_three_processes(tmp_path: Path) -> None:
    code, output = finish(start(3, "checks", tmp_path))
    assert code == 0, output


@pytest.mark.slow
def test_a_killed_process_stops_the_job_which_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    job = start(2, "train", tmp_path, *run_arguments("fsdp", cut))
    log, deadline = cut / "log.jsonl", time.monotonic() + TIME_LIMIT
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        assert job.poll() is None and time.monotonic() < deadline, finish(job)[1]
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    code, output = finish(job)
    assert code != 0
    assert "process 0 of 2: another process is gone" in output or (
        "process 0 of 2: stopped by signal 15" in output
    )
    assert f"every completed epoch is in {cut}: add --resume to go on" in output
    before = load_checkpoint(cut / "checkpoint.pt")["records"]
    assert 2 <= len(before) < 10

    alone = tmp_path / "alone"
    shutil.copytree(cut, alone)
    code, output = finish(start(2, "runs", tmp_path))
    assert code == 0, output

    assert train.main([*run_arguments("none", alone), "--resume"]) == 0
    lines = [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()]
    assert lines[: len(before)] == before
    assert len(lines) == 10
