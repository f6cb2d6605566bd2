"""Models of transformers, torchvision and timm: masked, trained a step, packed, saved, loaded.

Those libraries are optional (``pip install masked-kernels[third-party]``). All models are built
small and from random weights; nothing is downloaded.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import assert_within
from torch import Tensor, nn

import masked_kernels as mk

CONFIGS = {
    "pretrained": mk.recipes.piggyback(),
    "random": mk.recipes.edge_popup(),
    "prototype": mk.recipes.random_padding(1e-1),
}
every_config = pytest.mark.parametrize("config", CONFIGS)


def check(
    build: Callable[[], nn.Module],
    call: Callable[[nn.Module], Tensor],
    config: str,
    tmp_path: Path,
    unused: set[str] = frozenset(),
) -> dict[str, str]:
    """All the ways of a model; ``unused`` are layers that ``call`` does not reach. Returns the
    layers skipped and why.
    """
    model = build().eval()
    for p in model.parameters():
        if not p.any():  # some start with branches that pass nothing, hence no gradient
            nn.init.normal_(p, std=0.1)
    ties = len(list(model.parameters())), len(list(model.named_parameters(remove_duplicate=False)))
    with torch.no_grad():
        dense = call(model)
    report = mk.mask_model_(model, CONFIGS[config])
    assert report.converted
    after = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if config == "pretrained":  # every score starts above the threshold
        with torch.no_grad():
            torch.testing.assert_close(call(model), dense)
        added = len(report.converted)  # scores
        assert (len(list(model.parameters())) - added, len(after) - added) == ties
    model.train()
    call(model).square().mean().backward()
    for name, layer in model.named_modules():
        if isinstance(layer, mk.nn.MaskedLinear | mk.nn.MaskedConv2d) and name not in unused:
            assert layer.scores.grad is not None and layer.scores.grad.any(), name
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-2 * p.grad
    model.eval()
    plain = copy.deepcopy(model)
    mk.materialize_(plain)
    mk.save_masked(model, tmp_path / "model.mk")
    other = mk.load_masked(tmp_path / "model.mk", into=build())
    with torch.no_grad():
        expected, exact = call(plain), call(copy.deepcopy(plain).double())
        assert_within("masked", call(model), expected, exact)
        mk.pack_model_(model)
        assert_within("packed", call(model), expected, exact)
        assert torch.equal(call(other), call(model))
    return report.skipped


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
}
IMAGE = {"image_size": 16, "patch_size": 8, **TINY}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
TRANSFORMERS = {
    "BertForMaskedLM": ("BertConfig", TINY),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "decoder_start_token_id": 0}),
    "LlamaForCausalLM": ("LlamaConfig", {**TINY, "num_key_value_heads": 2}),
    "AlbertModel": ("AlbertConfig", {**TINY, "embedding_size": 16}),
    "CLIPVisionModel": ("CLIPVisionConfig", IMAGE),
    "ViTForImageClassification": ("ViTConfig", IMAGE),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 4},
    ),
}


@every_config
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, config: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an optional library")
    kind, arguments = TRANSFORMERS[name]

    def build() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, kind)(**arguments))

    tokens, images = torch.arange(6).view(2, 3), torch.randn(2, 3, 16, 16)

    def call(model: nn.Module) -> Tensor:
        if "Image" in name or "Vision" in name:
            output = model(images.to(next(model.parameters()).dtype))
        elif name.startswith("T5"):
            output = model(input_ids=tokens, decoder_input_ids=tokens)
        else:
            output = model(tokens)
        return output.logits if "logits" in output else output.last_hidden_state

    skipped = check(build, call, config, tmp_path, unused={"pooler"})
    if name == "BertForMaskedLM":
        tied = "its weight is also bert.embeddings.word_embeddings.weight"
        assert skipped["cls.predictions.decoder"] == tied
    elif name == "MambaForCausalLM":
        reads = "MambaMixer.forward reads its weight"
        assert skipped["backbone.layers.0.mixer.dt_proj"] == reads


@every_config
@pytest.mark.parametrize("name", ("mobilenet_v3_small", "shufflenet_v2_x0_5", "VisionTransformer"))
def test_torchvision(name: str, config: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is an optional library")
    sizes = (64, 16, 2, 4, 32, 48) if name == "VisionTransformer" else ()
    check_images(lambda: getattr(models, name)(*sizes), config, tmp_path)


@every_config
@pytest.mark.parametrize("name", ("test_vit", "test_resnet", "test_efficientnet", "test_convnext"))
def test_timm(name: str, config: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is an optional library")
    size = {"img_size": 64} if name == "test_vit" else {}
    check_images(lambda: timm.create_model(name, **size), config, tmp_path)


def check_images(build: Callable[[], nn.Module], config: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    check(build, lambda model: model(x.to(next(model.parameters()).dtype)), config, tmp_path)
