"""The benchmarks at toy size: every case runs, wrong results are stopped, reports render."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import masked_kernels as mk
from bench import __main__ as command
from bench import cases, machine, plots, problem, report, run
from bench.cases.linear import MaskedLinear
from bench.cases.network import PackedNetwork
from bench.timing import MINIMUM_SAMPLES, Task, interleaved

NOT_COMPILED = "^(?!.*compile)"
"""torch.compile takes seconds a case; one test has it."""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(command, "CASES", cases.TOY)
    monkeypatch.setattr(command, "peaks", lambda: machine.peaks(64, 1 << 16, seconds=1e-3))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("toy")
def test_toy_cases_run_and_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "toy.json"
    flags = ["--backend", "reference", "--threads", "1", "--seconds", "0.01", "--out", str(out)]
    assert command.main([*flags, "--providers", NOT_COMPILED]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert report.render(result) == printed
    assert [case["name"] for case in result["cases"]] == [case.name for case in cases.TOY]
    for case in result["cases"]:
        assert case["name"] in printed
        assert {"ours", report.fastest_dense(case)} <= set(case["providers"])
        for timing in case["providers"].values():
            assert 0 < timing["q20"] <= timing["median"] <= timing["q80"]
            assert timing["error"] <= timing["bound"]
    facts = result["machine"]
    assert facts["threads"] == 1
    assert facts["torch"] == torch.__version__
    assert facts["command"].startswith("python -m bench --backend reference")
    assert min(result["peaks"].values()) > 0

    written = plots.write(result, tmp_path / "docs")
    assert [path.name for path in written] == list(plots.FIGURES)
    assert all(path.read_text().startswith("<?xml") for path in written)


@pytest.mark.slow
def test_compiled_providers_are_right() -> None:
    case = PackedNetwork(8, 1, 2)
    names = {name for name in case.build("reference").providers if "compile" in name}
    assert len(names) == 4
    (result,) = run.run([case], "reference", 0.0, providers="compile")
    assert set(result["providers"]) == {"ours", *names}


def test_cases_have_names_of_their_own_and_the_short_form_is_some_of_them() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.name for case in cases.QUICK} < set(names)
    assert set(report.README) < set(names)
    assert {case.group for case in cases.CASES} == set(report.TITLES)


@pytest.mark.parametrize("case", cases.TOY, ids=lambda case: case.name)
def test_a_wrong_result_is_not_timed(case: problem.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a provider returns, the same of other inputs is wrong."""
    right = type(case).build

    def build(self: problem.Case, backend: str) -> problem.Problem:
        made = right(self, backend)
        ours = made.providers["ours"]()
        wrong = dataclasses.replace(ours, run=lambda x: ours.run(x.flip(0) if x.dim() > 2 else -x))
        if case.group == "select_topk":
            wrong = dataclasses.replace(ours, run=lambda x: ours.run(x.flip(1)))
        return dataclasses.replace(made, providers={**made.providers, "ours": lambda: wrong})

    monkeypatch.setattr(type(case), "build", build)
    with pytest.raises(run.WrongResult, match="ours has an error of"):
        list(run.run([case], "reference", 0.0, providers="none"))


def test_lossy_providers_have_a_bound_of_their_own() -> None:
    made = MaskedLinear(16, 32, 4).build("reference")
    providers = {name: make() for name, make in made.providers.items() if name in ("bf16", "int8")}
    assert set(providers) == {"bf16", "int8"}
    errors = run.check("case", made, providers)
    for name, provider in providers.items():
        assert provider.lossy is not None
        assert 0 < errors[name] <= provider.lossy < 0.1
        strict = dataclasses.replace(provider, lossy=errors[name] / 2)
        with pytest.raises(run.WrongResult, match=rf"{name} has an error of .* relative"):
            run.check("case", made, {name: strict})
        exact = dataclasses.replace(provider, lossy=None)
        with pytest.raises(run.WrongResult, match="times the error of plain PyTorch"):
            run.check("case", made, {name: exact})


TIMING = {
    "median": 2e-3,
    "q20": 1.9e-3,
    "q80": 2.25e-3,
    "error": 1.0,
    "lossy": False,
    "bytes": None,
}


def result_of(*named: tuple[str, str]) -> dict:
    """A result of cases (name, group); ours takes 2 ms, b 1 ms and moves 1 MB in it."""
    half = {key: value / 2 for key, value in TIMING.items() if key in ("median", "q20", "q80")}
    b = {**TIMING, **half, "bytes": 1_000_000, "lossy": True, "error": 0.003}
    facts = dict.fromkeys(("cpu", "cores", "threads", "isa", "torch", "commit", "dirty"), "a")
    return {
        "machine": {**facts, "date": "2026-01-02T03:04:05", "command": "python -m bench"},
        "peaks": {"multiply_adds": 1e9, "bytes": 4e9},
        "backend": "cpu",
        "cases": [
            {
                "name": name,
                "group": group,
                "multiply_adds": 500_000,
                "dense": ["b"],
                "providers": {"ours": TIMING, "b": b},
            }
            for name, group in named
        ],
    }


def test_losses_are_shown() -> None:
    lines = report.render(result_of(("slow", "network"))).splitlines()
    assert "| slow | `ours` | 2 ms | 1.9 ms to 2.25 ms |  | 25 % |  | 1 |" in lines
    row = "|  | `b` | 1 ms | 950 µs to 1.12 ms | 0.50x | 50 % | 25 % | 0.003 (lossy) |"
    assert row in lines


def test_the_readme_shows_its_cases_and_nothing_else_changes(tmp_path: Path) -> None:
    shown = report.README[-3]
    result = result_of(("other", "training"), (shown, "training"))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    report.write_readme(result, readme)
    table = f"| case | ours | over `b` (lossy) |\n| --- | --- | --- |\n| {shown} | 2 ms | 0.50x |"
    assert readme.read_text() == f"before\n<!-- speed -->\n{table}\n<!-- /speed -->\nafter\n"


def test_interleaved_takes_enough_samples_and_rotates() -> None:
    seen: list[int] = []
    tasks = {"a": Task(seen.append, (1, 2, 3)), "b": Task(lambda _: None, (1,))}
    timings = interleaved(tasks, 0.0, warm_up=1e-4)
    assert all(timing.samples >= MINIMUM_SAMPLES for timing in timings.values())
    assert set(seen) == {1, 2, 3}
    assert seen[:4] == [1, 2, 3, 1]


def test_refresh_runs_before_every_call() -> None:
    calls: list[str] = []

    def refresh(x: str) -> str:
        calls.append("refresh")
        return x + "!"

    task = Task(calls.append, ("x",), refresh)
    assert interleaved({"a": task}, 0.0, warm_up=1e-4)["a"].calls == 1
    assert calls == ["refresh", "x!"] * (len(calls) // 2)


def test_command_line_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    missing = next((name for name, reason in mk.backends().items() if reason), None)
    assert missing is not None
    assert command.main(["--backend", missing]) == 1
    assert "unavailable" in capsys.readouterr().err
    assert command.main(["--backend", "reference", "--cases", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err


def test_select_warm_cases_step_in_place_and_do_not_drift() -> None:
    case = next(c for c in cases.TOY if re.search("after a step", c.name))
    made = case.build("reference")
    ours = made.providers["ours"]()
    assert ours.refresh is not None
    scores = ours.prepare(made.inputs[0])
    for step in range(1, 9):
        assert ours.refresh(scores) is scores
        apart = float((scores - made.inputs[0]).norm() / made.inputs[0].norm())
        assert apart < 1e-6 if step % 4 == 0 else 1e-4 < apart < 1e-2
