"""Saving and loading: same predictions, real sizes, and no way for a damaged file to pass."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels.storage import CODECS, codecs, inspect_file
from masked_kernels.storage.format import KEY

RECIPES = {
    "edge_popup": mk.recipes.edge_popup(),
    "one_layer": mk.recipes.one_layer(),
    "max_layer_padding": mk.recipes.max_layer_padding(),
    "random_padding": mk.recipes.random_padding(1e-1),
    "self_masking": mk.MaskConfig(mk.Threshold(0.0, rescale=True), values="pretrained"),
}


class Small(nn.Module):
    """Convolution, normalisation, a plain layer, a buffer of its own, biases."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, (1, 3), groups=2, padding="same", bias=False)
        self.plain = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("offset", torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x)).relu()).mean((2, 3))
        return self.head(self.plain(x)) + self.offset


def small(width: int = 6, recipe: str | None = "random_padding", seed: int = 0) -> nn.Module:
    """A Small model whose normalisation has seen data; ``recipe=None`` leaves it plain."""
    torch.manual_seed(seed)
    model = Small(width)
    if recipe is not None:
        mk.mask_model_(model, RECIPES[recipe], filter_fn=lambda name, _: name != "plain", seed=seed)
    model(torch.randn(4, 3, 7, 5))
    return model.eval()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(7)).to(dtype)


def bits(model: nn.Module) -> dict[str, bytes]:
    """The whole state, byte for byte."""
    return {
        name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in model.state_dict().items()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "small.mk"
    mk.save_masked(small(), path)
    return path


@pytest.mark.parametrize(
    ("dtype", "packed"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.bfloat16, True),
    ],
    ids=("float32", "bfloat16", "float16", "bfloat16-packed"),
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_and_state_survive(
    tmp_path: Path, recipe: str, dtype: torch.dtype, packed: bool
) -> None:
    model = small(recipe=recipe).to(dtype)
    expected = model(images(dtype))
    path = tmp_path / "model.mk"
    if packed:
        mk.pack_model_(model)
    before = bits(model)
    mk.save_masked(model, path)
    assert bits(model) == before, "saving changed the model"

    targets = {
        "plain": small(recipe=None, seed=1),
        "masked": small(recipe=recipe, seed=1),
        "packed": small(recipe="edge_popup", seed=1),
    }
    mk.pack_model_(targets["packed"])
    mk.pack_model_(model)
    for name, target in targets.items():
        target = target.to(dtype).train()
        loaded = mk.load_masked(path, into=target)
        assert loaded is target and not loaded.training
        assert torch.equal(loaded(images(dtype)), expected), name
        assert bits(loaded) == bits(model), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rebuilds_a_created_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = mk.models.create_model("convmixer", dim=16, depth=1, num_classes=3)
    mk.mask_model_(model, mk.recipes.random_padding(1e-1))
    model = model.to(dtype)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    model(x)  # moves the running statistics
    expected = model.eval()(x)
    mk.save_masked(model, tmp_path / "model.mk")
    generator = torch.get_rng_state()
    loaded = mk.load_masked(tmp_path / "model.mk")
    assert torch.equal(torch.get_rng_state(), generator), "loading moved the global generator"
    assert torch.equal(loaded(x), expected)
    assert mk.models.spec_of(loaded) == mk.models.spec_of(model)


def test_predicts_the_same_in_a_new_process(tmp_path: Path) -> None:
    model = mk.models.create_model("convmixer", dim=16, depth=1, num_classes=3)
    mk.mask_model_(model, mk.recipes.random_padding(1e-1))
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    mk.save_masked(model, tmp_path / "model.mk")
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    script = """if True:
        import sys, safetensors.torch, masked_kernels as mk
        x = safetensors.torch.load_file(sys.argv[2])["x"]
        y = mk.load_masked(sys.argv[1])(x).detach()
        safetensors.torch.save_file({"y": y}, sys.argv[3])
    """
    files = [str(tmp_path / name) for name in ("model.mk", "x.safetensors", "y.safetensors")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    assert torch.equal(safetensors.torch.load_file(files[2])["y"], expected)


def test_equal_models_give_equal_files(saved: Path, tmp_path: Path) -> None:
    mk.save_masked(small(), tmp_path / "again.mk")
    assert (tmp_path / "again.mk").read_bytes() == saved.read_bytes()


def test_a_shared_prototype_stays_one_buffer(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    assert [name for name in tensors if name.startswith(("prototype/", "weight/"))] == [
        "prototype/0"
    ]
    loaded = mk.load_masked(saved, into=small(recipe=None))
    assert len({m.values.data_ptr() for m in loaded.modules() if isinstance(m, mk.Prototype)}) == 1
    assert len({id(m) for m in loaded.modules() if isinstance(m, mk.Prototype)}) == 1


def test_a_dense_weight_of_equal_shapes_stays_one_buffer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    mk.mask_model_(model, mk.recipes.one_layer())
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert report.value_bytes == 4 * (8 * 8 + 8 * 4)
    loaded = mk.load_masked(tmp_path / "m.mk", into=model)
    assert loaded[0].weight is loaded[1].weight


def test_tied_state_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict(
            {"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9, bias=False), "c": nn.Linear(4, 4)}
        )
        model["b"].weight = model["a"].weight
        mk.mask_model_(model, mk.recipes.edge_popup(), filter_fn=lambda name, _: name == "c")
        return model

    model = tied()
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert report.other_bytes == 4 * (9 * 4 + 4)  # the embedding and the bias of c
    loaded = mk.load_masked(tmp_path / "m.mk", into=tied())
    assert loaded["a"].weight is loaded["b"].weight
    assert torch.equal(loaded["a"].weight, model["a"].weight)

    untied = tied()
    untied["b"].weight = nn.Parameter(torch.randn(9, 4))
    mk.save_masked(untied, tmp_path / "untied.mk")
    with pytest.raises(mk.FormatError, match=r"'b\.weight'.*'a\.weight'"):
        mk.load_masked(tmp_path / "untied.mk", into=tied())


def test_a_layer_under_two_names(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    mk.mask_model_(model, mk.recipes.edge_popup())
    assert model[0] is model[2]
    x = torch.randn(3, 4)
    expected = model(x)
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert report.mask_bytes == 2
    loaded = mk.load_masked(tmp_path / "m.mk", into=model)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("codec", ("auto", *CODECS))
@pytest.mark.parametrize("density", (0.5, 0.01))
def test_codecs_and_sizes(tmp_path: Path, codec: str, density: float) -> None:
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 3))
    mk.mask_model_(model, mk.recipes.random_padding(1e-2, density=density))
    path = tmp_path / "model.mk"
    report = mk.save_masked(model, path, codec=codec)
    parts = report.mask_bytes, report.value_bytes, report.other_bytes, report.header_bytes
    assert sum(parts) == report.file_bytes == path.stat().st_size
    assert report == inspect_file(path).sizes
    assert report.mask_bytes_raw == 2500 + 75
    assert report.value_bytes == 4 * 201  # int(20_000 * 1e-2) + 1
    assert report.other_bytes == 4 * 203
    assert report.dense_bytes == 4 * (20_600 + 203)
    assert report.paper_ratio == pytest.approx(1 / 32 + 201 / 20_600)
    assert report.ratio == report.file_bytes / report.dense_bytes
    assert f"{report.file_bytes:,}" in str(report)
    if codec == "auto":
        assert report.mask_bytes <= report.mask_bytes_raw
    if codec == "raw":
        assert report.mask_bytes == report.mask_bytes_raw
    if density == 0.01 and codec != "raw":
        assert report.mask_bytes < report.mask_bytes_raw
    x = torch.randn(4, 100)
    expected = model(x)
    assert torch.equal(mk.load_masked(path, into=model)(x), expected)


def test_the_papers_numbers(tmp_path: Path) -> None:
    """ConvMixer-256/6 with random padding 1e-2: 96.73 % by the paper's formula."""
    model = mk.models.create_model("convmixer_256_6")
    mk.mask_model_(model, mk.recipes.random_padding(1e-2))
    report = mk.save_masked(model, tmp_path / "m.mk", codec="raw")
    assert (report.mask_bytes, report.value_bytes) == (54_656, 2_624)
    assert 1 - report.paper_ratio == pytest.approx(0.9673, abs=1e-4)
    counters = 13 * 8  # BatchNorm's num_batches_tracked
    assert report.dense_bytes == 1_802_240 + counters
    assert report.other_bytes == 53_248 + counters


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=300), codec=st.sampled_from(("auto", *CODECS)))
def test_codecs_return_what_they_took(data: bytes, codec: str) -> None:
    used, compressed = codecs.compress(data, codec)
    assert codecs.decompress(compressed, used, len(data)) == data
    for wrong in (len(data) + 1, len(data) - 1):
        if wrong >= 0:
            with pytest.raises(ValueError, match=f"expected {wrong}"):
                codecs.decompress(compressed, used, wrong)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(min_size=1, max_size=60), codec=st.sampled_from(tuple(CODECS)))
def test_codecs_refuse_other_bytes_with_value_error(data: bytes, codec: str) -> None:
    with pytest.raises(ValueError, match=codec):
        codecs.decompress(data, codec, 1_000)


def test_a_small_stream_cannot_ask_for_much_memory() -> None:
    zeros = bytes(10**7)
    for codec in ("zlib", "lzma"):
        _, compressed = codecs.compress(zeros, codec)
        with pytest.raises(ValueError, match="more than 10"):
            codecs.decompress(compressed, codec, 10)


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
    path.write_bytes(safetensors.torch.save({}, {KEY: json.dumps({"version": 2})}))
    with pytest.raises(mk.FormatError, match="got format version 2, expected 1"):
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


def test_mask_bytes_are_the_ones_documented(tmp_path: Path) -> None:
    """The worked example of docs/format.md: 5 x 8 bits, three of them set."""
    layer = mk.nn.PackedLinear(
        8,
        5,
        weight=mk.Prototype(torch.ones(3)),
        mask=mk.PackedMask.from_bytes(bytes([0x01, 0x80, 0, 0, 0x10]), (5, 8)),
    )
    mk.save_masked(nn.Sequential(layer), tmp_path / "m.mk", codec="raw")
    stored = safetensors.torch.load_file(tmp_path / "m.mk")["mask/0"]
    assert stored.tolist() == [0x01, 0x80, 0, 0, 0x10]
    assert layer.mask.unpack().nonzero().tolist() == [[0, 0], [1, 7], [4, 4]]
