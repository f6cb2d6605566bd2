"""The GPU report as far as it goes without a GPU: its problems are right, wrong results are
stopped, the page renders.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import gpu_page, gpu_report, gpu_training, nets
from bench.gpu_cases import CASES, TOY, Case

TOY_NET = nets.TOYS[0]


@pytest.mark.parametrize("case", TOY, ids=lambda case: case.name)
def test_problems_are_right(case: Case) -> None:
    problem = case.build("cpu", "reference")
    assert gpu_report.wrong_results(problem) == {}
    assert {"ours", problem.baseline} <= set(problem.providers)


@pytest.mark.parametrize("case", TOY, ids=lambda case: case.name)
def test_wrong_results_are_stopped(case: Case) -> None:
    problem = case.build("cpu", "reference")
    right = problem.providers["ours"]
    wrong = {**problem.providers, "ours": lambda i: 1 + right(i)}
    problem = dataclasses.replace(problem, providers=wrong)
    assert set(gpu_report.wrong_results(problem)) == {"ours"}


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to report on")
def test_no_report_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert gpu_report.main(["--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("no report: ")
    assert not out.exists()


@pytest.mark.parametrize("way", nets.ways(TOY_NET))
def test_training_steps_learn(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets, "RATE", 0.1)
    step = gpu_training.make_step(TOY_NET, way, "cpu", "reference", batch=4)
    first = step()
    for _ in range(5):
        last = step()
    assert last < first


def test_page() -> None:
    facts = {
        "gpu": "Device",
        "torch": "2.13",
        "triton": "3.9",
        "cuda": "13.0",
        "commit": "abc",
        "dirty": True,
        "date": "today",
    }
    graph = {"median": 10.0, "q20": 9.0, "q80": 11.0}
    providers = {"ours": {"graph": graph, "eager": graph}, "F.linear": {"eager": {"median": 35.0}}}
    step = {"peak_bytes": 2_000_000, "peak_bytes_per_weight": 30.0}
    result = {
        "machine": facts,
        "tests": {"summary": "5 passed", "exit": 0},
        "cases": [
            {"name": "a", "baseline": "F.linear", "providers": providers},
            {"name": "b", "error": "wrong results: {'ours': inf}"},
        ],
        "training": {
            "Net, batch 2": {
                "ours": {**step, "median": 12.5, "graph": 9.0, "peak_bytes": 3_000_000},
                "dense eager": {
                    **step,
                    "median": 10.0,
                    "graph": 8.0,
                    "peak_bytes_per_weight": 28.5,
                },
                "published layer": {"error": "OutOfMemoryError: no"},
            },
        },
    }
    page = gpu_page.render(result)
    assert "commit abc with changes" in page
    assert "| a | ours | 10.0 | 10.0 | - | - |" in page
    assert "| a | F.linear | - | 35.0 | - | 3.50x |" in page
    assert "| b | wrong results: {'ours': inf} | | | | |" in page
    assert "| Net, batch 2 | ours | 12.50 | 1.250x | 9.00 | 1.125x | 3 | 30.0 | +1.5 |" in page
    assert (
        "| Net, batch 2 | dense eager | 10.00 | 1.000x | 8.00 | 1.000x | 2 | 28.5 | +0.0 |" in page
    )
    assert "| Net, batch 2 | published layer | OutOfMemoryError: no |" in page
    short = gpu_page.short(result)
    assert "| a | 10.0 | `F.linear` **3.50x** (launched by the host) |" in short
    assert "| Net, batch 2 | 1.12 | 1.25 | - |" in short
