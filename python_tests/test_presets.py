"""Presets against the papers' own numbers, and what flags make of them."""

from pathlib import Path

import pytest
import train

import masked_kernels as mk
from masked_kernels.training import NETS, PRESETS, ROWS, Preset, Row, find_net

CONVMIXER = ["--preset", "pemn/convmixer-8-512/rp-1e-3"]

# Optimizer, largest rate, weight decay, batch, epochs, schedule: PEMN, supplement A.
HYPERPARAMETERS = {
    "convmixer": ("adamw", 0.05, 0.005, 512, 100, "triangular"),
    "vit": ("adam", 1e-4, 0.0, 256, 200, "cosine"),
    "resnet": ("sgd", 0.1, 5e-4, 256, 100, "cosine"),
}


@pytest.mark.parametrize("kind", HYPERPARAMETERS)
def test_settings_are_the_papers(kind: str) -> None:
    nets = [net for name, net in NETS.items() if name.startswith(f"pemn/{kind}")]
    assert len(nets) >= 4
    for net in nets:
        s = net.settings
        found = (s.optimizer, s.lr, s.weight_decay, s.batch_size, s.epochs, s.schedule)
        assert found == HYPERPARAMETERS[kind]
        assert net.datasets[0] == "cifar10"
        assert net.settings.momentum == 0.9


@pytest.mark.parametrize("depth", [6, 8])
@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize("kind", ["convmixer", "vit"])
def test_a_net_is_named_depth_then_dim_and_a_model_dim_then_depth(
    kind: str, dim: int, depth: int
) -> None:
    assert NETS[f"pemn/{kind}-{depth}-{dim}"].model == f"{kind}_{dim}_{depth}"


def test_every_net_has_a_model() -> None:
    assert {net.model for net in NETS.values()} <= set(mk.models.list_models())


def test_rows_are_the_papers() -> None:
    assert ROWS["dense"].mask_config() is None
    assert ROWS["mask"].mask_config() == mk.recipes.edge_popup()
    assert ROWS["one-layer"].mask_config() == mk.recipes.one_layer()
    assert ROWS["mp"].mask_config() == mk.recipes.max_layer_padding()
    for ratio in ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5"):
        assert ROWS[f"rp-{ratio}"].mask_config() == mk.recipes.random_padding(float(ratio))


@pytest.mark.parametrize("how", ["random", "magnitude"])
@pytest.mark.parametrize("percent", [90, 92, 94, 96])
def test_pruned_rows_save_storage_or_weights(how: str, percent: int) -> None:
    """A kept weight of p takes three words of p: 3 p density = (1 - saving) p."""
    by_storage, by_rate = ROWS[f"{how}-{percent}"], ROWS[f"{how}-{percent}-rate"]
    assert by_storage.recipe == by_rate.recipe == how
    assert 3 * by_storage.density == pytest.approx(1 - percent / 100)
    assert by_rate.density == pytest.approx(1 - percent / 100)


def test_every_net_goes_with_every_row() -> None:
    assert len(PRESETS) == len(set(PRESETS)) == len(NETS) * len(ROWS)
    for name in PRESETS:
        assert str(Preset.parse(name)) == name
    assert Preset.parse("pemn/resnet-32") == Preset("pemn/resnet-32", "rp-1e-2")


@pytest.mark.parametrize("name", ["pemn/resnet-31/mp", "pemn/resnet-32/rp", "mp", "", "/mp"])
def test_an_unknown_preset_says_what_there_is(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}', expected NET/ROW .*pemn/vit-6-256.*one-layer"
    ):
        Preset.parse(name)


def test_the_first_net_that_suits_is_found() -> None:
    assert find_net() == find_net("digits") == find_net(model="convmixer") == "small/digits"
    assert find_net("cifar10") == "small/cifar10"
    assert find_net("cifar10", "convmixer_512_8") == "pemn/convmixer-8-512"
    assert find_net(None, "resnet56") == "pemn/resnet-56"
    assert find_net("cifar100", "vit") == "pemn/vit-6-256"
    with pytest.raises(ValueError, match="no preset for vit on digits; give one: small/digits, "):
        find_net("digits", "vit")


def test_what_is_given_beats_the_preset() -> None:
    args = train.parse_arguments([*CONVMIXER, "--device", "cuda"])
    assert (args.model, args.model_args, args.dataset) == ("convmixer_512_8", {}, "cifar10")
    assert args.out == Path("runs/pemn/convmixer-8-512/rp-1e-3")
    assert args.row == ROWS["rp-1e-3"] and args.settings == NETS["pemn/convmixer-8-512"].settings
    flags = "--epochs 3 --batch-size 64 --lr 0.01 --augment crop-flip --seed 5 --density 0.3"
    args = train.parse_arguments([*CONVMIXER, *flags.split()])
    settings = args.settings
    assert (settings.epochs, settings.batch_size, settings.lr, settings.seed) == (3, 64, 0.01, 5)
    assert "RandAugment" not in repr(settings.augment) and "Erasing" not in repr(settings.erase)
    assert settings.weight_decay == 0.005
    assert (args.row.ratio, args.row.density) == (1e-3, 0.3)
    assert train.parse_arguments([*CONVMIXER, "--recipe", "edge_popup"]).row == ROWS["mask"]
    assert train.parse_arguments(["--preset", "pemn/vit-6-256/random-96", "--dense"]).row == Row(
        "dense"
    )


def test_a_presets_fp16_is_for_cuda_and_a_given_one_for_any_device() -> None:
    assert NETS["pemn/convmixer-8-512"].settings.amp == "fp16"
    assert train.parse_arguments([*CONVMIXER, "--device", "cpu"]).settings.amp == "off"
    for amp in ("fp16", "bf16"):
        args = train.parse_arguments([*CONVMIXER, "--device", "cpu", "--amp", amp])
        assert args.settings.amp == amp


def test_fields_of_the_mask_configuration_can_be_given() -> None:
    given = ["--mask-args", "seeded=true", "mode=rand", "weight_init=signed_constant"]
    config = train.parse_arguments([*CONVMIXER, *given]).mask_config
    assert (config.seeded, config.mode, config.weight_init) == (True, "rand", "signed_constant")
    assert config.ratio == 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "pemn/convmixer-8-512/rp"], "unknown preset 'pemn/convmixer-8-512/rp'"),
        ([*CONVMIXER, "--mask-args", "mode=random"], "mode: got 'random', expected one of copy"),
        ([*CONVMIXER, "--mask-args", "mode"], "got mode, expected NAME=VALUE"),
        ([*CONVMIXER, "--epochs", "0"], "epochs: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments(flags)
    assert message in capsys.readouterr().err


def test_model_arguments_may_be_numbers_words_and_truths() -> None:
    given = ["--model-args", "dim=8", "shortcut=B", "norm_affine=false", "dropout=0.5"]
    args = train.parse_arguments([*CONVMIXER, *given])
    assert args.model_args == {"dim": 8, "shortcut": "B", "norm_affine": False, "dropout": 0.5}
