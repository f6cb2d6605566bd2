"""``bench tune --backend triton``: the fit finds the settings that times were made of, and what it
writes is read.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import __main__ as command
from bench import tune_triton
from masked_kernels.backends.triton import settings as shipped
from masked_kernels.backends.triton.config import Settings, Tile

OTHER = Settings(
    planes_slots=16,
    many_tokens=(32, 1024),
    fused_cols=256,
    fewest=dataclasses.replace(Tile(*tune_triton._FEW[1]), tokens=8),
    few=Tile(*tune_triton._FEW[2]),
    some=Tile(*tune_triton._SOME[1]),
    many=Tile(*tune_triton._MANY[1]),
    many_float32=Tile(*tune_triton._MANY[2]),
)


@pytest.mark.parametrize("settings", [Settings(), OTHER], ids=["default", "other"])
def test_fit_recovers_the_settings(settings: Settings) -> None:
    """From times in which their choices are twice as fast as every other."""

    def timer(problem: tune_triton.Problem, choice: tune_triton.Choice) -> float:
        return 1.0 if choice == tune_triton.chosen(problem, settings) else 2.0

    for start in (Settings(), OTHER):
        fitted = tune_triton.fit(tune_triton.grid(), timer, start)
        for problem in tune_triton.grid():
            assert tune_triton.chosen(problem, fitted) == tune_triton.chosen(problem, settings)
        assert fitted.few == settings.few and fitted.fused_cols == settings.fused_cols


def test_choices_can_be_forced() -> None:
    for problem in tune_triton.grid():
        for plan in ("tiles", "library"):
            choice = tune_triton.Choice(plan, Tile(32, 16, 64) if plan == "tiles" else None)
            assert tune_triton.chosen(problem, tune_triton.forced(choice)) == choice
    aligned = tune_triton.Problem(4, 1024, 1024, 1024, torch.bfloat16, False)
    planes = tune_triton.Choice("planes", None)
    assert tune_triton.chosen(aligned, tune_triton.forced(planes)) == planes


def test_written_settings_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpus.json"
    path.write_text('{"sm_80": {"source": "derived", "fused_cols": 1}, "sm_90": {"fused_cols": 2}}')
    tune_triton.write("Some GPU", OTHER, {"commit": "abc"}, path)
    assert json.loads(path.read_text())["Some GPU"]["source"] == "measured"
    monkeypatch.setattr(shipped, "GPUS", path)
    of = shipped.settings_of_gpu.__wrapped__
    assert of("Some GPU", "sm_90") == OTHER
    assert of("Another", "sm_90") == dataclasses.replace(Settings(), fused_cols=2)
    assert of("Another", "sm_86").fused_cols == of("Another", "sm_80").fused_cols == 1
    assert of("Another", "sm_75") == of("Another", "gfx90a") == Settings()


def test_shipped_settings() -> None:
    """None of a GPU by name as long as none was measured; all of the architectures named."""
    table = json.loads(shipped.GPUS.read_text())
    assert {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"} <= set(table)
    for name, fields in table.items():
        assert fields["source"] == ("derived" if name[:3] in ("sm_", "gfx") else "measured")
        settings = shipped.settings_of_gpu.__wrapped__(name, "")
        assert 0 <= settings.planes_slots <= 64
        assert settings.fewest.tokens <= 8 and settings.few.tokens <= 16
        assert settings.some.tokens <= 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_no_tuning_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpus.json"
    assert command.main(["tune", "--backend", "triton", "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not out.exists()
