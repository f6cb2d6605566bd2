"""The training loop: what it logs, and that stopping anywhere and resuming changes no bit."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

import masked_kernels as mk
from masked_kernels.training import (
    ImageDataset,
    Normalize,
    Settings,
    Splits,
    best_record,
    evaluate,
    fit,
    predict,
)
from masked_kernels.training.augment import RandomCrop
from masked_kernels.training.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from masked_kernels.training.trainer import Trainer

SETTINGS = Settings(epochs=4, batch_size=16, lr=0.02, augment=RandomCrop(1), seed=3)


@pytest.fixture
def data() -> Splits:
    """Bright or dark 6x6 squares, easy to tell apart."""

    def part(count: int) -> ImageDataset:
        labels = torch.arange(count) % 2
        noise = torch.randint(
            0, 60, (count, 1, 6, 6), generator=torch.Generator().manual_seed(count)
        )
        return ImageDataset((noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    return Splits("squares", ("dark", "bright"), (0.4,), (0.3,), part(50), part(20), part(30))


def make_model(seed: int = 0, masked: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, 2, bias=False),
    )
    if masked:
        mk.mask_model_(model, mk.recipes.random_padding(0.1), seed=seed)
    return model


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_fit_learns_and_logs_one_line_an_epoch(tmp_path: Path, data: Splits) -> None:
    model = make_model()
    records = fit(model, data, SETTINGS, tmp_path, progress=False)
    assert lines(tmp_path) == records
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["lr"] == 0.0
    assert set(records[0]["layers"]) == {"0", "5"}
    for layer in records[0]["layers"].values():
        assert layer["density"] == 0.5
        assert 0 < layer["flip_rate"] < 1
    score = evaluate(model, data.test, Normalize(data.mean, data.std))
    assert score.accuracy > 0.9
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@dataclass
class Inverting:
    """Dark for bright after so many batches: what was learned is unlearned."""

    after: int
    calls: int = 0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        self.calls += 1
        return images if self.calls <= self.after else 255 - images


def test_fit_ends_with_the_weights_of_the_best_validation_epoch(
    tmp_path: Path, data: Splits
) -> None:
    settings = replace(SETTINGS, augment=Inverting(12), schedule="constant", epochs=6)
    model = make_model()
    records = fit(model, data, settings, tmp_path, progress=False)
    best = best_record(records)
    assert best is not records[-1]
    score = evaluate(model, data.val, Normalize(data.mean, data.std))
    assert score.accuracy == best["val_accuracy"]
    assert score.loss == pytest.approx(best["val_loss"])


def test_best_record_prefers_accuracy_then_loss_then_the_earliest() -> None:
    def record(epoch: int, accuracy: float, loss: float) -> dict:
        return {"epoch": epoch, "val_accuracy": accuracy, "val_loss": loss}

    records = [record(1, 0.8, 0.1), record(2, 0.9, 0.4), record(3, 0.9, 0.3), record(4, 0.9, 0.3)]
    assert best_record(records)["epoch"] == 3


@dataclass
class Interrupting:
    """Random crops until the given batch, then what a Ctrl-C raises."""

    after: int
    calls: list[int] = field(default_factory=list)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        self.calls.append(len(images))
        if len(self.calls) > self.after:
            raise KeyboardInterrupt
        return RandomCrop(1)(images, generator)

    def __repr__(self) -> str:
        return repr(RandomCrop(1))


@pytest.mark.parametrize(
    ("masked", "mode"),
    [
        (True, {}),
        (False, {}),
        (True, {"amp": "fp16", "clip_norm": 0.5}),
        (True, {"amp": "bf16", "optimizer": "sgd"}),
        (True, {"accumulate": 3, "channels_last": True}),
    ],
)
def test_interrupted_in_mid_epoch_and_resumed_is_bit_identical(
    tmp_path: Path, data: Splits, masked: bool, mode: dict
) -> None:
    settings = replace(SETTINGS, **mode)
    whole, cut = make_model(masked=masked), make_model(masked=masked)
    fit(whole, data, settings, tmp_path / "whole", progress=False)

    # Batches are four an epoch: the tenth is the second of the third epoch.
    torch.manual_seed(7)  # whatever the global generator was, what dropout draws is the epoch's own
    interrupted = replace(settings, augment=Interrupting(9))
    with pytest.raises(KeyboardInterrupt):
        fit(cut, data, interrupted, tmp_path / "cut", progress=False)
    assert len(lines(tmp_path / "cut")) == 2
    resumed = make_model(seed=9, masked=masked)  # as in a new process: other weights and state
    records = fit(resumed, data, settings, tmp_path / "cut", resume=True, progress=False)

    assert_same_tensors(whole.state_dict(), resumed.state_dict())
    left, right = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert_same_tensors(left["model"], right["model"])
    for slot, values in left["optimizer"]["state"].items():
        assert_same_tensors(values, right["optimizer"]["state"][slot])
    assert left["scaler"] == right["scaler"]
    if (
        settings.amp == "fp16"
    ):  # it has been at work: the scale a new scaler starts from was too big
        assert left["scaler"]["scale"] < torch.amp.GradScaler("cpu").get_scale()
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert [r["train_loss"] for r in lines(tmp_path / "whole")] == [
        r["train_loss"] for r in records
    ]


def test_a_log_line_lost_or_torn_by_a_kill_comes_back(tmp_path: Path, data: Splits) -> None:
    records = fit(make_model(), data, SETTINGS, tmp_path, progress=False)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    again = fit(make_model(), data, SETTINGS, tmp_path, resume=True, progress=False)
    assert again == records == lines(tmp_path)


def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path: Path, data: Splits) -> None:
    one = replace(SETTINGS, epochs=1)
    fit(make_model(), data, one, tmp_path, identity={"recipe": "a"}, progress=False)
    with pytest.raises(FileExistsError, match="resume"):
        fit(make_model(), data, one, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"lr was 0.02, is 0.5$"):
        changed = replace(one, lr=0.5)
        fit(make_model(), data, changed, tmp_path, identity={"recipe": "a"}, resume=True)
    with pytest.raises(ValueError, match="recipe was a, is b"):
        fit(make_model(), data, one, tmp_path, identity={"recipe": "b"}, resume=True)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"x": torch.ones(2)})

    def fails(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_an_interrupt_in_the_middle_of_a_checkpoint_is_no_more_than_that(tmp_path: Path) -> None:
    """In a process of its own: torch's unfinished writer could end it."""
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"x": torch.ones(2)})
    interrupted = textwrap.dedent("""
        import gc, pathlib, sys
        import torch
        from masked_kernels.training.checkpoint import save_checkpoint

        def interrupt(*_):
            raise KeyboardInterrupt

        torch.serialization._open_zipfile_writer_buffer.__exit__ = interrupt
        try:
            save_checkpoint(pathlib.Path(sys.argv[1]), {"x": torch.zeros(2)})
        except KeyboardInterrupt:
            gc.collect()
            print("interrupted")
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", interrupted, str(path)]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert (process.returncode, process.stdout) == (0, "interrupted\n")
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_damaged_checkpoint_is_refused_and_nothing_else_is_touched(
    tmp_path: Path, data: Splits
) -> None:
    one = replace(SETTINGS, epochs=1)
    fit(make_model(), data, one, tmp_path, progress=False)
    checkpoint = tmp_path / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    others = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != checkpoint}
    cut = {length: whole[:length] for length in (0, 1, 100, len(whole) // 2, len(whole) - 1)}
    scores = load_checkpoint(checkpoint)["model"]["0.scores"]
    altered = bytearray(whole)
    altered[whole.index(scores.numpy().tobytes())] ^= 1  # torch.load would not notice
    for content in (*cut.values(), bytes(altered)):
        checkpoint.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"checkpoint\.pt is not a whole checkpoint \([\d,]+ b"
        ):
            fit(make_model(), data, one, tmp_path, resume=True, progress=False)
        assert checkpoint.read_bytes() == content
        assert others == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != checkpoint}
    checkpoint.write_bytes(whole)
    assert fit(make_model(), data, one, tmp_path, resume=True, progress=False) == lines(tmp_path)


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path, data: Splits) -> None:
    one = replace(SETTINGS, epochs=1)
    for name in (".checkpoint.pt.k1ll3d", ".log.jsonl.k1ll3d", ".other"):
        (tmp_path / name).write_bytes(b"half")
    fit(make_model(), data, one, tmp_path, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("checkpoint.pt", "log.jsonl", "curves.png", ".other")
    }


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Trainer}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_checkpoint(tmp_path / "bad.pt")


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_equal_seeds_give_equal_bits_and_the_order_matters(tmp_path: Path, data: Splits) -> None:
    def train(name: str, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = make_model()
        fit(model, data, replace(SETTINGS, seed=seed, epochs=2), tmp_path / name, progress=False)
        return model.state_dict()

    first = train("a", 0)
    assert_same_tensors(first, train("b", 0))
    assert not torch.equal(first["0.scores"], train("c", 1)["0.scores"])


def test_frozen_values_stay_and_scores_train(tmp_path: Path, data: Splits) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, data, SETTINGS, tmp_path, progress=False)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"0.scores", "5.scores", "1.weight", "1.running_mean"} <= changed
    assert not {name for name in changed if "prototype" in name}


def test_predict_is_in_eval_mode_and_restores_training(data: Splits) -> None:
    model = make_model().train()
    normalize = Normalize(data.mean, data.std)
    logits = predict(model, data.test.images, normalize, batch_size=7)
    assert model.training
    assert logits.shape == (30, 2)
    torch.testing.assert_close(logits, predict(model, data.test.images, normalize))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, expected at least 1"),
        ({"accumulate": 0}, "accumulate: got 0, expected at least 1"),
        ({"schedule": "step"}, "schedule: got 'step', expected one of triangular"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', expected one of adamw"),
        ({"amp": "fp8"}, "amp: got 'fp8', expected one of off, fp16, bf16"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0, expected more than 0"),
    ],
)
def test_settings_are_checked(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)
