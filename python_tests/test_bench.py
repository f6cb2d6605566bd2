"""The benchmarks at toy size: every case runs, wrong results are stopped, reports render."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import masked_kernels as mk
from bench import __main__ as command
from bench import registry, report, run
from bench.timing import MINIMUM_SAMPLES, interleaved


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CASES", registry.TOY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("toy")
def test_toy_cases_run_and_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "toy.json"
    flags = ["--backend", "reference", "--threads", "1", "--seconds", "0.01", "--out", str(out)]
    assert command.main(flags) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert report.render(result) == printed
    assert [case["name"] for case in result["cases"]] == [case.name for case in registry.TOY]
    for case in result["cases"]:
        assert case["name"] in printed
        assert {"ours", case["baseline"]} <= set(case["providers"])
        for timing in case["providers"].values():
            assert 0 < timing["q20"] <= timing["median"] <= timing["q80"]
            assert timing["error"] <= run.LARGEST_ERROR
    machine = result["machine"]
    assert machine["threads"] == 1
    assert machine["torch"] == torch.__version__
    assert machine["command"].startswith("python -m bench --backend reference")


def test_all_cases_have_names_of_their_own() -> None:
    names = [case.name for case in registry.CASES]
    assert len(set(names)) == len(names)
    assert set(registry.QUICK) - set(registry.CASES) == {
        registry.MaskedLinear(1024, 1024, 1, ratio=None)
    }


@pytest.mark.parametrize("case", registry.TOY, ids=lambda case: case.name)
def test_a_wrong_result_is_not_timed(case: registry.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = type(case).build

    def build(self: registry.Case, backend: str) -> registry.Problem:
        problem = right(self, backend)
        ours = problem.providers["ours"]
        providers = {**problem.providers, "ours": lambda x: 1 + ours(x)}
        return dataclasses.replace(problem, providers=providers)

    monkeypatch.setattr(type(case), "build", build)
    with pytest.raises(run.WrongResult, match=r"ours has .* times the error"):
        list(run.run([case], "reference", seconds=0.0))


def test_losses_are_shown() -> None:
    timing = {"median": 2e-3, "q20": 1.9e-3, "q80": 2.25e-3}
    half = {key: value / 2 for key, value in timing.items()}
    machine = dict.fromkeys(("cpu", "cores", "threads", "isa", "torch", "commit", "dirty"), "a")
    result = {
        "machine": {**machine, "date": "2026-01-02T03:04:05", "command": "python -m bench"},
        "backend": "cpu",
        "cases": [{"name": "slow", "baseline": "b", "providers": {"ours": timing, "b": half}}],
    }
    row = "| slow | 2 ms (1.9 to 2.25) | 1 ms (0.95 to 1.12) | 0.50x |"
    assert row in report.render(result).splitlines()


def test_interleaved_takes_enough_samples_and_rotates() -> None:
    seen: list[int] = []
    timings = interleaved({"a": seen.append, "b": lambda _: None}, (1, 2, 3), 0.0, warm_up=1e-4)
    assert {name: timing.samples for name, timing in timings.items()} == {
        "a": MINIMUM_SAMPLES,
        "b": MINIMUM_SAMPLES,
    }
    assert set(seen) == {1, 2, 3}


def test_providers_and_command_line_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    missing = next((name for name, reason in mk.backends().items() if reason), None)
    assert missing is not None
    assert command.main(["--backend", missing]) == 1
    assert "unavailable" in capsys.readouterr().err
    assert command.main(["--backend", "reference", "--cases", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err
