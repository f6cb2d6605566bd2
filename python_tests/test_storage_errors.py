"""Damaged files, wrong models, failed saves: a clear error, and nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from storage_cases import Small, bits, small
from torch import nn

import masked_kernels as mk
from masked_kernels.storage.format import KEY


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "small.mk"
    mk.save_masked(small(), path)
    return path


def test_every_altered_byte_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    target = small(recipe=None)
    before = bits(target)
    positions = {
        *range(16),
        *range(16, header, 23),
        *range(header - 4, header + 4),
        *range(header, len(data), 11),
        len(data) - 1,
    }
    for position in positions:
        for change in (0x01, 0x20, 0xFF):
            altered = bytearray(data)
            altered[position] ^= change
            saved.write_bytes(altered)
            with pytest.raises(mk.FormatError, match=saved.name):
                mk.load_masked(saved, into=target)
    assert bits(target) == before
    saved.write_bytes(data)
    mk.load_masked(saved, into=target)


def test_padding_of_the_header_counts_too(tmp_path: Path) -> None:
    """A tab for a space leaves the JSON as it was, so only the digest can tell."""
    path, padded = tmp_path / "m.mk", 0
    for length in range(1, 9):
        model = nn.ModuleDict({"x" * length: nn.Linear(2, 2)})
        mk.mask_model_(model, mk.recipes.edge_popup())
        mk.save_masked(model, path)
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        if data[header - 1 : header] == b" ":
            padded += 1
            path.write_bytes(data[: header - 1] + b"\t" + data[header:])
            with pytest.raises(mk.FormatError, match="altered"):
                mk.load_masked(path, into=model)
    assert padded


def test_truncated_and_extended_files(saved: Path) -> None:
    data = saved.read_bytes()
    target = small(recipe=None)
    before = bits(target)
    for size in {0, 1, 7, 8, 9, *range(10, len(data), 97), len(data) - 1}:
        saved.write_bytes(data[:size])
        with pytest.raises(mk.FormatError, match=rf"{saved.name}.*{size} bytes"):
            mk.load_masked(saved, into=target)
    saved.write_bytes(data + b"\0")
    with pytest.raises(mk.FormatError, match="altered"):
        mk.load_masked(saved, into=target)
    assert bits(target) == before


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "other"
    for content in (b"hello, world", b"\x80\x04\x95pickle", safetensors.torch.save({})):
        path.write_bytes(content)
        with pytest.raises(mk.FormatError, match="other"):
            mk.load_masked(path)
    path.write_bytes(safetensors.torch.save({}, {KEY: json.dumps({"version": 1})}))
    with pytest.raises(mk.FormatError, match="got format version 1, expected 2"):
        mk.load_masked(path)
    with pytest.raises(FileNotFoundError):
        mk.load_masked(tmp_path / "absent")


def without_head() -> nn.Module:
    model = small(recipe=None)
    del model.head
    return model


def with_extra() -> nn.Module:
    model = small(recipe=None)
    model.extra = nn.Linear(2, 2)
    return model


def with_masked_plain_layer() -> nn.Module:
    model = small(recipe=None)
    mk.mask_model_(model, mk.recipes.edge_popup())
    return model


def with_other_norm() -> nn.Module:
    model = small(recipe=None)
    model.norm = nn.BatchNorm2d(6, track_running_stats=False)
    return model


def without_bias() -> nn.Module:
    model = small(recipe=None)
    model.head.bias = None
    return model


def with_other_kind() -> nn.Module:
    model = small(recipe=None)
    model.head = nn.Conv2d(6, 5, 1)
    return model


WRONG = {
    "width": (lambda: small(8, None), r"layer 'conv': got out_channels=6, expected out_channels=8"),
    "dtype": (lambda: small(recipe=None).half(), r"layer 'conv': got torch.float32.*torch.float16"),
    "missing layer": (without_head, r"layer 'head': got linear.*nothing of that name"),
    "extra layer": (with_extra, r"tensor 'extra.bias': missing"),
    "extra masked layer": (with_masked_plain_layer, r"layer 'plain': got none.*MaskedLinear"),
    "state": (with_other_norm, r"tensor 'norm.num_batches_tracked': unexpected"),
    "bias": (without_bias, r"layer 'head': got bias=True, expected bias=False"),
    "kind": (with_other_kind, r"layer 'head': got linear, expected as in the model: Conv2d"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models_are_named_and_untouched(saved: Path, case: str) -> None:
    make, message = WRONG[case]
    target = make().train()
    before, modules = bits(target), list(target.modules())
    with pytest.raises(mk.FormatError, match=f"{saved.name}.*{message}"):
        mk.load_masked(saved, into=target)
    assert bits(target) == before
    assert list(target.modules()) == modules and target.training


def test_a_wrong_shape_outside_the_layers(saved: Path) -> None:
    target = small(recipe=None)
    target.offset = torch.zeros(1)
    with pytest.raises(mk.FormatError, match=r"tensor 'offset': got shape \(5,\), expected \(1,\)"):
        mk.load_masked(saved, into=target)


def test_what_cannot_be_saved_or_loaded(tmp_path: Path, saved: Path) -> None:
    path = tmp_path / "model.mk"
    with pytest.raises(ValueError, match="Small without masked layers"):
        mk.save_masked(small(recipe=None), path)
    with pytest.raises(ValueError, match="bare MaskedLinear"):
        mk.save_masked(mk.nn.MaskedLinear(3, 3), path)
    with pytest.raises(ValueError, match=r"'gzip'.*auto, raw, zlib, lzma"):
        mk.save_masked(small(), path, codec="gzip")
    with pytest.raises(mk.FormatError, match="into=model"):
        mk.load_masked(saved)
    with pytest.raises(ValueError, match="meta"):
        mk.load_masked(saved, into=Small().to("meta"))
    assert not path.exists()


def test_a_killed_save_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    script = """if True:
        import os, signal, sys
        import torch, masked_kernels as mk
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        mk.mask_model_(model, mk.recipes.edge_popup())
        mk.save_masked(model, sys.argv[1])
    """
    killed = subprocess.run([sys.executable, "-c", script, str(saved)], check=False)
    assert killed.returncode == -9
    assert saved.read_bytes() == before


def test_a_failed_save_leaves_the_old_file_and_no_other(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        mk.save_masked(small(seed=3), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
