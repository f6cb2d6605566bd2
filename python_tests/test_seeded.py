"""Seeded and permuted values: what layers hold, what files hold instead, and damaged origins."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from storage_cases import RECIPES, bits, small
from torch import nn

import masked_kernels as mk
from masked_kernels.draw import Draw
from masked_kernels.storage.inspect import inspect_file

SEEDED = {name: config for name, config in RECIPES.items() if config.seeded}


def convmixer(config: mk.MaskConfig, seed: int = 3) -> nn.Module:
    """Layers of 192, 400, 256, 400, 256 and 160 weights; the second is the first of the largest."""
    model = mk.models.create_model("convmixer", dim=16, depth=2)
    mk.mask_model_(model, config, seed=seed)
    return model


def prototypes(model: nn.Module) -> list[mk.Prototype]:
    layers = mk.nn.MaskedLinear | mk.nn.MaskedConv2d
    return [m.prototype for m in model.modules() if isinstance(m, layers)]


def test_values_are_those_of_the_documented_draw() -> None:
    def std(fan_in: int) -> float:
        return 2**0.5 / fan_in**0.5

    shapes = [(192, 12), (400, 25), (256, 16), (400, 25), (256, 16), (160, 16)]
    draws = [Draw(3, i, "normal", std(fan), n) for i, (n, fan) in enumerate(shapes)]
    popup = prototypes(convmixer(mk.recipes.edge_popup(seeded=True)))
    assert [p.draw for p in popup] == draws
    assert all(torch.equal(p.values, d.values()) for p, d in zip(popup, draws, strict=True))

    shared = prototypes(convmixer(mk.recipes.one_layer(seeded=True)))
    assert [p.draw for p in shared] == [draws[i] for i in (0, 1, 2, 1, 2, 5)]
    assert shared[1] is shared[3] and shared[2] is shared[4]

    largest = prototypes(convmixer(mk.recipes.max_layer_padding(seeded=True)))
    padded = prototypes(convmixer(mk.recipes.random_padding(1e-1, seeded=True)))
    assert largest[0].draw == draws[1] and padded[0].draw == draws[1].first(41)
    assert {id(p) for p in padded} == {id(padded[0])}


def test_literal_seeded_draw() -> None:
    """Pins the seed's meaning: a change here makes published seeds and files useless."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    mk.mask_model_(model, mk.recipes.random_padding(0.5, seeded=True), seed=0)
    expected = ["0x1.d04e5cp+0", "0x1.a17166p+0", "-0x1.968bbep+0", "0x1.4563e6p-1"]
    assert model[0].prototype.values.tolist() == [float.fromhex(text) for text in expected]


@pytest.mark.parametrize("recipe", SEEDED)
def test_a_seeded_model_computes_what_its_dense_weights_do(recipe: str, backend: str) -> None:
    model = small(recipe=recipe)
    plain = small(recipe=recipe)
    mk.materialize_(plain)
    x = torch.randn(3, 3, 7, 5)
    with mk.use_backend(backend):
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("recipe", SEEDED)
def test_a_file_holds_8_bytes_of_values(recipe: str, tmp_path: Path) -> None:
    model = small(recipe=recipe)
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert (report.value_bytes, report.values, report.seeds) == (8, 0, 1)
    assert report.paper_ratio == pytest.approx((report.weights + 64) / (32 * report.weights))
    assert "1 seed of 8 B" in str(report) and "frozen values" not in str(report)
    tensors = safetensors.torch.load_file(tmp_path / "m.mk")
    assert tensors["seed/0"].tolist() == [0]
    assert not any(name.startswith(("prototype/", "weight/", "kept/")) for name in tensors)
    stored = inspect_file(tmp_path / "m.mk").layers
    assert all("seeded" in layer.values for layer in stored)
    assert all(("shuffled" in layer.values) == (recipe == "seeded rand") for layer in stored)

    loaded = mk.load_masked(tmp_path / "m.mk", into=small(recipe=None, seed=5))
    mk.save_masked(loaded, tmp_path / "again.mk")
    assert (tmp_path / "again.mk").read_bytes() == (tmp_path / "m.mk").read_bytes()


def test_edge_popup_needs_no_values(tmp_path: Path) -> None:
    model = mk.models.create_model("convmixer_256_6")
    mk.mask_model_(model, mk.recipes.edge_popup(seeded=True))
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert report.value_bytes == 8
    assert 1 - report.paper_ratio == pytest.approx(1 - 1 / 32, abs=1e-5)
    assert report.file_bytes < 128_000 < 1_749_000 / 2 < report.dense_bytes / 2
    mk.mask_model_(plain := mk.models.create_model("convmixer_256_6"), mk.recipes.edge_popup())
    assert mk.save_masked(plain, tmp_path / "m.mk").value_bytes == 4 * 437_248 // 2


def test_another_process_draws_the_same(tmp_path: Path) -> None:
    model = convmixer(mk.recipes.random_padding(1e-1, mode="rand", seeded=True)).eval()
    mk.save_masked(model, tmp_path / "m.mk")
    script = """if True:
        import sys, torch, safetensors.torch, masked_kernels as mk
        torch.manual_seed(77)
        model = mk.load_masked(sys.argv[1])
        safetensors.torch.save_file({"values": model.head.prototype.values}, sys.argv[2])
    """
    files = [str(tmp_path / "m.mk"), str(tmp_path / "values")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    assert torch.equal(safetensors.torch.load_file(files[1])["values"], model.head.prototype.values)


def test_two_seeds_are_two_seeds(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    config = mk.recipes.edge_popup(seeded=True)
    mk.mask_model_(model, config, lambda name, _: name == "0", seed=11)
    mk.mask_model_(model, config, seed=2**62)
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert (report.value_bytes, report.seeds) == (16, 2)
    x = torch.randn(2, 8)
    expected = model(x)
    assert torch.equal(mk.load_masked(tmp_path / "m.mk", into=model)(x), expected)


@pytest.mark.parametrize("mode", ("copy", "rand"))
def test_changed_values_are_stored_themselves(mode: str, tmp_path: Path) -> None:
    """As after training them, or a checkpoint of another seed: never the wrong seed's numbers."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    mk.mask_model_(model, mk.recipes.random_padding(0.1, mode=mode, seeded=True))
    prototype = model[0].prototype
    prototype.values[3] += 1
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert (report.seeds, report.values) == (0, prototype.period)
    x = torch.randn(2, 16)
    expected = model(x)
    loaded = mk.load_masked(tmp_path / "m.mk", into=model)
    assert torch.equal(loaded(x), expected) and loaded[0].prototype.draw is None


def test_values_that_lost_bits_are_not_stored_as_a_seed(tmp_path: Path) -> None:
    """bfloat16 is made of the draw; float32 made of that bfloat16 is not."""
    model = nn.Sequential(nn.Linear(16, 4))
    mk.mask_model_(model, mk.recipes.edge_popup(seeded=True))
    assert mk.save_masked(model.to(torch.bfloat16), tmp_path / "m.mk").seeds == 1
    assert mk.save_masked(model.to(torch.float32), tmp_path / "m.mk").seeds == 0


def test_rand_permutes_the_repeated_vector_once_for_all_layers(tmp_path: Path) -> None:
    copied, permuted = (
        convmixer(mk.recipes.random_padding(1e-1, mode=mode)) for mode in ("copy", "rand")
    )
    short, long = prototypes(copied)[0].values, prototypes(permuted)[0].values
    assert (len(short), len(long)) == (41, 400)
    assert {id(p) for p in prototypes(permuted)} == {id(prototypes(permuted)[0])}
    assert torch.equal(long.sort().values, mk.Prototype(short).fill((400,)).sort().values)
    order = torch.stack([(short == value).nonzero()[0, 0] for value in long])
    assert not torch.equal(order, torch.arange(400) % 41)
    head = permuted.head.dense_weight()
    assert torch.equal(head[head != 0], long[:160].view(10, 16)[head != 0])

    report = mk.save_masked(permuted, tmp_path / "m.mk")
    assert (report.value_bytes, report.values, report.seeds) == (41 * 4 + 8, 41, 1)
    tensors = safetensors.torch.load_file(tmp_path / "m.mk")
    assert torch.equal(tensors["prototype/0"], short)
    assert torch.equal(mk.load_masked(tmp_path / "m.mk").head.prototype.values, long)


def test_a_prototype_longer_than_every_layer_is_stored(tmp_path: Path) -> None:
    """A reader takes no seed for more values than the layers have weights."""
    prototype = mk.Prototype.of_draw(Draw(0, 0, "normal", 1.0, 40))
    model = nn.Sequential(mk.nn.MaskedLinear(8, 4, weight=prototype))
    report = mk.save_masked(model, tmp_path / "m.mk")
    assert (report.seeds, report.values) == (0, 40)
    assert torch.equal(
        mk.load_masked(tmp_path / "m.mk", into=model)[0].prototype.values, prototype.values
    )


def rewrite(
    path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
) -> None:
    """Change a file's manifest and tensors and give it the digest that it then has."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["masked_kernels"])
    tensors = safetensors.torch.load_file(path)
    change(manifest, tensors)
    zeros = "0" * 64
    manifest["sha256"] = zeros
    text = json.dumps(manifest, separators=(",", ":"))
    data = safetensors.torch.save(tensors, {"masked_kernels": text})
    path.write_bytes(data.replace(zeros.encode(), hashlib.sha256(data).hexdigest().encode()))


def draw(**fields: Any) -> Callable[..., object]:
    return lambda m, _: m["origins"]["prototype/0"]["draw"].update(fields)


def shuffle(**fields: Any) -> Callable[..., object]:
    return lambda m, _: m["origins"]["prototype/0"]["shuffle"].update(fields)


def origin(**fields: Any) -> Callable[..., object]:
    return lambda m, _: m["origins"]["prototype/0"].update(fields)


def tensor(name: str, value: torch.Tensor) -> Callable[..., object]:
    return lambda _, tensors: tensors.update({name: value})


DAMAGED = {
    "distribution": (draw(distribution="cauchy"), "distribution: got 'cauchy'"),
    "scale": (draw(scale="1"), "scale: got '1'"),
    "count": (draw(count=2), "draw: got count 2, expected 17"),
    "no such seed": (draw(seed="seed/9"), "seed/9"),
    "too long": (shuffle(length=10**12), "got period 1000000000000, expected at most 162"),
    "too short": (shuffle(length=1), "length: got 1, expected at least 17"),
    "field": (shuffle(colour=1), "colour"),
    "dtype": (origin(dtype="int8"), "dtype: got 'int8'"),
    "other dtype": (
        origin(dtype="float16"),
        "got torch.float16, expected torch.float32",
    ),
    "neither": (origin(draw=None, shuffle=None), "got neither"),
    "nothing stored": (origin(draw=None), "got no tensor 'prototype/0'"),
    "a list": (lambda m, _: m.update(origins=[]), "malformed manifest"),
    "no origins": (lambda m, _: m.pop("origins"), "malformed manifest.*'origins'"),
    "unused": (
        lambda m, _: m["origins"].update({"prototype/7": m["origins"]["prototype/0"]}),
        "got the origin of 'prototype/7', which no layer",
    ),
    "values": (lambda m, _: m["layers"][0].update(values="mask/conv"), "values: got 'mask/conv'"),
    "float seed": (tensor("seed/0", torch.ones(1)), "seed/0: got torch.float32"),
    "two in a seed": (tensor("seed/0", torch.tensor([1, 2])), r"seed/0: got torch.int64 \(2,\)"),
    "negative seed": (tensor("seed/0", torch.tensor([-1])), "seed: got -1"),
    "unused seed": (tensor("seed/1", torch.tensor([5])), "got tensor 'seed/1', which no layer"),
    "unused values": (tensor("kept/conv", torch.ones(3)), "got tensor 'kept/conv', which no layer"),
}


def check_refused(path: Path, message: str) -> None:
    target = small(recipe=None)
    before = bits(target)
    with pytest.raises(mk.FormatError, match=f"{path.name}.*{message}"):
        mk.load_masked(path, into=target)
    assert bits(target) == before


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_origins_leave_the_model_untouched(case: str, tmp_path: Path) -> None:
    change, message = DAMAGED[case]
    mk.save_masked(small(recipe="seeded rand"), tmp_path / "m.mk")
    rewrite(tmp_path / "m.mk", change)
    check_refused(tmp_path / "m.mk", message)


def test_rewriting_nothing_changes_nothing(tmp_path: Path) -> None:
    """So that what the test above sees is the change."""
    model, loaded = small(recipe="seeded rand"), small(recipe=None)
    mk.save_masked(model, tmp_path / "m.mk")
    rewrite(tmp_path / "m.mk", lambda *_: None)
    mk.load_masked(tmp_path / "m.mk", into=loaded)
    assert loaded.conv.mask == model.conv.mask


def test_stored_values_must_have_their_length(tmp_path: Path) -> None:
    path = tmp_path / "m.mk"
    mk.save_masked(small(recipe="edge_popup"), path)
    kept = safetensors.torch.load_file(path)["kept/conv"].numel()
    for size in (0, kept - 1, 162):
        rewrite(path, tensor("kept/conv", torch.ones(size)))
        check_refused(path, rf"layer 'conv': got shape \({size},\), expected \({kept},\)")
    mk.save_masked(small(recipe="rand"), path)
    rewrite(path, tensor("prototype/0", torch.ones(16)))
    check_refused(path, r"layer 'conv': .*expected those that Shuffle")
