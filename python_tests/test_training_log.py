"""What is recorded of a run: masks, speed, memory; as a picture and for TensorBoard."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import masked_kernels as mk
from masked_kernels.training.curves import plot_curves
from masked_kernels.training.records import EpochRecord, LayerStats, current_masks, layer_stats
from masked_kernels.training.run_files import RunFiles
from masked_kernels.training.tensorboard import TensorBoard, scalars
from masked_kernels.training.usage import peak_memory


def make_model(rule: mk.Rule) -> nn.Module:
    model = nn.Sequential(nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 3))
    mk.mask_model_(model, mk.MaskConfig(rule=rule))
    return model


def make_record(epoch: int, **stats: LayerStats) -> EpochRecord:
    return {
        "epoch": epoch,
        "lr": 0.1,
        "train_loss": 2.0,
        "train_accuracy": 0.25,
        "val_loss": 2.5,
        "val_accuracy": 0.125,
        "seconds": 8.0,
        "step_seconds": 0.5,
        "images_per_second": 100.0,
        "peak_memory_bytes": 2**30,
        "layers": stats,
    }


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_threshold_is_the_kth_largest_score(density: float) -> None:
    model = make_model(mk.TopK(density))
    for name, stats in layer_stats(model, current_masks(model)).items():
        scores = model.get_submodule(name).scores
        dropped = int((1 - density) * scores.numel())
        assert stats["threshold"] == scores.abs().flatten().sort().values[dropped].item()
        assert stats["density"] == (scores.numel() - dropped) / scores.numel()
        assert stats["flip_rate"] == 0


def test_flips_are_counted_and_raw_scores_are_not_made_absolute() -> None:
    model = make_model(mk.Threshold(0.0))
    before = current_masks(model)
    with torch.no_grad():
        model[0].scores.copy_(torch.linspace(-2.0, 1.0, 80).view(8, 10))
        model[2].scores.fill_(-1.0)
    stats = layer_stats(model, before)
    scores = model[0].scores.detach()
    assert stats["0"]["threshold"] == scores[scores > 0].min().item()
    flips = (before["0"].unpack() != (scores > 0)).double().mean().item()
    assert 0 < stats["0"]["flip_rate"] == flips
    assert stats["2"] == {
        "density": 0.0,
        "flip_rate": before["2"].density(),
        "threshold": None,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux's own account")
def test_peak_memory_is_this_processs_in_bytes() -> None:
    def kernels_account() -> int:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
        return 1024 * int(line.split()[1])

    before = kernels_account()
    peak = peak_memory(torch.device("cpu"))
    assert 0 < before <= peak <= kernels_account()


MASKED = {
    "conv": LayerStats(density=0.5, flip_rate=0.25, threshold=0.01),
    "head": LayerStats(density=0.0, flip_rate=0.0, threshold=None),
}


@pytest.mark.parametrize("layers", [{}, MASKED])
def test_curves_are_drawn(tmp_path: Path, layers: dict) -> None:
    plot_curves([make_record(epoch, **layers) for epoch in (1, 2)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_scalars_name_every_figure() -> None:
    flat = scalars(make_record(3, **MASKED))
    assert flat["loss/train"] == 2.0 and flat["accuracy/validation"] == 0.125
    assert flat["flip_rate/conv"] == 0.25 and flat["density/head"] == 0.0
    assert "threshold/head" not in flat
    assert flat["memory/peak_bytes"] == 2**30


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    yield


@pytest.mark.usefixtures("no_tensorboard")
def test_a_missing_tensorboard_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, tensorboard=True)
    assert files.open(resume=False) is None
    with pytest.raises(ImportError, match=r"pip install 'masked-kernels\[tensorboard\]'"):
        files.begin([])


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, 0)
    for epoch in (1, 2, 3):
        first.add(make_record(epoch, **MASKED))
    first.writer.close()
    second = TensorBoard(tmp_path, 1)  # killed before the checkpoint of the second epoch
    for epoch in (2, 3):
        second.add(make_record(epoch, **MASKED))
    second.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3]
    assert events.Scalars("flip_rate/conv")[0].value == 0.25


def test_a_process_that_does_not_write_leaves_the_folder_alone(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, writes=False)
    assert files.open(resume=False) is None
    files.begin([])
    files.add(make_record(1), {})
    files.finish([make_record(1)])
    assert list(tmp_path.iterdir()) == []
