"""The examples as a user runs them: killed and resumed, packed and reloaded, compared, reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import numpy as np
import predict
import pytest
import report
import torch
import train

import masked_kernels as mk
from masked_kernels.training.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).parent.parent
TINY = ("--model-args", "dim=16", "depth=1", "--batch-size", "32", "--threads", "1", "--quiet")


@pytest.fixture(autouse=True)
def _threads():
    """The examples may set the number of threads; other tests shall not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(out: Path) -> list[str]:
    """A run of 12 short epochs, resumed if it can be."""
    return [*TINY, "--limit-train", "320", "--epochs", "12", "--resume", "--out", str(out)]


def stop_after(epochs: int, out: Path, stop: signal.Signals) -> tuple[int, str]:
    """Train in a process of its own and stop it in the epoch after this one; code and output."""
    command = [sys.executable, str(REPOSITORY / "examples/train.py"), *arguments(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    log, deadline = out / "log.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < epochs:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.03)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_killed_twice_and_resumed_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(arguments(whole)) == 0

    code, _ = stop_after(2, cut, signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed_at = len(load_checkpoint(cut / "checkpoint.pt")["records"])
    assert 2 <= killed_at < 9
    code, output = stop_after(killed_at + 2, cut, signal.SIGINT)
    assert code == 130
    assert "add --resume to go on" in output
    assert killed_at + 2 <= len(load_checkpoint(cut / "checkpoint.pt")["records"]) < 12
    assert train.main(arguments(cut)) == 0

    expected, found = (load_checkpoint(run / "checkpoint.pt") for run in (whole, cut))
    for part in ("model", "best_weights"):
        assert expected[part].keys() == found[part].keys()
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, found[part][name]), (part, name)
    epochs = [json.loads(line)["epoch"] for line in (cut / "log.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 13))
    assert (cut / "test_logits.npy").read_bytes() == (whole / "test_logits.npy").read_bytes()


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished masked run, two epochs long."""
    out = tmp_path_factory.mktemp("runs") / "masked"
    assert train.main([*TINY, "--epochs", "2", "--ratio", "1e-1", "--out", str(out)]) == 0
    return out


def test_train_writes_what_it_says(masked_run: Path) -> None:
    result = json.loads((masked_run / "result.json").read_text())
    assert result["packed_same_predictions"]
    assert result["packed_test_accuracy"] == result["test_accuracy"]
    assert result["images"] == [1294, 144, 359]
    assert result["recipe"]["ratio"] == 0.1
    assert result["settings"]["batch_size"] == 32
    assert result["settings"]["lr"] == 0.02  # the preset's
    assert result["model_args"] == {"dim": 16, "depth": 1, "kernel_size": 3, "patch_size": 2}
    assert result["sizes"]["file_bytes"] == (masked_run / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("preset", "row", "recipe"),
    [
        ("pemn/convmixer-6-256/rp-1e-1", "rp-1e-1", {"values": "random_padding", "ratio": 0.1}),
        ("pemn/resnet-20/magnitude-96-rate", "magnitude-96-rate", {"pruning": "magnitude"}),
    ],
)
def test_a_papers_preset_shrinks_by_flags(
    tmp_path: Path, preset: str, row: str, recipe: dict
) -> None:
    size = ["depths=[1,1,1]", "width=4"] if "resnet" in preset else ["dim=16", "depth=1"]
    flags = "--dataset digits --limit-train 96 --val-size 0 --limit-test 40 --epochs 2 --lr 0.01"
    flags += " --batch-size 48 --augment none --accumulate 2 --amp bf16 --clip-norm 1 --threads 1"
    given = ["--preset", preset, *flags.split(), "--model-args", *size]
    assert train.main([*given, "--quiet", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["preset"], result["row"], result["chosen_by"]) == (preset, row, "test")
    assert recipe.items() <= result["recipe"].items()
    assert result["images"] == [96, 40, 40]
    assert result["val_accuracy"] == result["test_accuracy"] == result["packed_test_accuracy"]
    assert result["settings"]["amp"] == "bf16" and result["settings"]["accumulate"] == 2
    assert result["step_seconds"] > 0 and result["images_per_second"] > 0
    assert result["peak_memory_bytes"] > 50 * 2**20


def test_predict_agrees_with_the_trained_model(
    masked_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "logits.npy"
    assert predict.main([str(masked_run / "model.safetensors"), "--out", str(out)]) == 0
    trained, packed = np.load(masked_run / "test_logits.npy"), np.load(out)
    np.testing.assert_array_equal(packed.argmax(1), trained.argmax(1))
    np.testing.assert_allclose(packed, trained, rtol=0, atol=1e-4)
    accuracy = json.loads((masked_run / "result.json").read_text())["test_accuracy"]
    assert f"({100 * accuracy:.2f} %)" in capsys.readouterr().out


def test_dense_and_named_backend(tmp_path: Path) -> None:
    arguments = [
        *TINY,
        "--dense",
        "--backend",
        "reference",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert train.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["recipe"] is None
    weights = 16 * 4 + 16 * 9 + 16 * 16 + 16 * 10
    assert result["sizes"]["file_bytes"] >= 4 * weights


def test_wrong_use_is_a_message_and_a_code(
    masked_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*TINY, "--epochs", "2", "--ratio", "1e-1", "--out", str(masked_run)]
    assert train.main(again) == 2
    assert "checkpoint.pt exists: resume" in capsys.readouterr().err
    assert train.main([*again, "--resume", "--lr", "0.5"]) == 2
    assert "lr was 0.02, is 0.5" in capsys.readouterr().err
    assert train.main([*TINY, "--dataset", "mnist", "--data", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    unavailable = [name for name, reason in mk.backends().items() if reason]
    if unavailable:
        assert train.main([*again, "--backend", unavailable[0]]) == 2
        assert unavailable[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse_arguments(["--model-args", "dim"])
    assert "NAME=VALUE" in capsys.readouterr().err


def test_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "digits",
        "cifar10",
        "random_padding",
        "triton",
        "pemn/vit-8-512",
        "rp-1e-5",
        "--resume",
    ):
        assert word in text


def test_demo_writes_one_self_contained_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mains = {"train.py": train.main, "predict.py": predict.main}

    def in_this_process(script: str, *arguments: str | Path) -> None:
        more = ["--quiet", "--threads", "1"] if script == "train.py" else []
        assert mains[script]([*map(str, arguments), *more]) == 0

    monkeypatch.setattr(demo, "example", in_this_process)
    monkeypatch.setattr(
        sys, "argv", ["demo.py", "--out", str(tmp_path), "--epochs", "1", "--seconds", "0.1"]
    )
    assert demo.main() == 0
    page = (tmp_path / "report.html").read_text()
    assert "359 of 359 predictions" in page.replace("\n", " ").replace("  ", " ")
    assert page.count("<svg") == 2 and "data:image/png;base64," in page
    # Nothing is fetched: no reference leaves the page.
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    for drawn in report.COLORS:
        assert drawn not in page


def test_duration_has_three_figures() -> None:
    assert [report.duration(t) for t in (65.0, 1.234, 0.01234, 4.56e-5, 2e-7)] == [
        "65 s",
        "1.23 s",
        "12.3 ms",
        "45.6 µs",
        "0.2 µs",
    ]
