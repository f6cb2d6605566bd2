"""Saving and loading: same predictions, real sizes, and no way for a damaged file to pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_cases import RECIPES, bits, drop_masked_, images, small
from torch import nn

import masked_kernels as mk
from masked_kernels.storage import CODECS, codecs, inspect_file


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
    drop_masked_(model)
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
    assert report.value_bytes == 4 * (8 * 8 + 8 * 4 // 2)  # half of the last one's is masked
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
