"""What a step does: pieces of a batch, mixed precision, clipping, memory formats, compilation."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import masked_kernels as mk
from masked_kernels.training import ImageDataset, Settings, Splits, World
from masked_kernels.training.trainer import Trainer

SETTINGS = Settings(epochs=1, batch_size=24, optimizer="sgd", momentum=0.0, weight_decay=0.0)


def make_data(count: int = 24, side: int = 6) -> Splits:
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        images = torch.randint(0, 256, (count, 3, side, side), generator=generator)
        labels = torch.randint(0, 4, (count,), generator=generator)
    part = ImageDataset(images.to(torch.uint8), labels)
    return Splits("noise", tuple("abcd"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.3), part, part, part)


class ToDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def make_model(norm: bool = False, double: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        ToDouble() if double else nn.Identity(),
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4, bias=False),
    )
    mk.mask_model_(model, mk.recipes.edge_popup())
    return model.double() if double else model


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def gradient(settings: Settings, world: World | None = None, *, norm: bool = False) -> Tensor:
    """Return the float64 gradient of a batch, or of this process's share, as one vector."""
    data = make_data()
    trainer = Trainer(make_model(norm, double=True), data, settings, {}, world)
    rank, size = trainer.world.rank, trainer.world.size
    share = data.train.share(rank, size)
    trainer.backward(trainer.normalize(share.images), share.labels, len(data.train))
    return flat_gradient(trainer.model)


@pytest.mark.parametrize("pieces", [2, 5, 24, 100])
def test_pieces_of_a_batch_give_its_gradient(pieces: int) -> None:
    whole = gradient(SETTINGS)
    assert whole.abs().max() > 0
    parts = gradient(replace(SETTINGS, accumulate=pieces))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


def test_batch_norm_sees_pieces() -> None:
    """The caveat of ``accumulate`` is real: statistics are of the piece."""
    whole = gradient(SETTINGS, norm=True)
    parts = gradient(replace(SETTINGS, accumulate=2), norm=True)
    assert (parts - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("size", [2, 5])
def test_the_mean_over_processes_is_the_gradient_of_the_batch(size: int) -> None:
    """Shares of 24 images among 5 differ in size, and each counts by its images."""
    shares = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        shares.append(gradient(replace(SETTINGS, accumulate=2), world))
    mean = torch.stack(shares).mean(dim=0)
    torch.testing.assert_close(mean, gradient(SETTINGS), rtol=1e-12, atol=1e-15)


class Watch(nn.Module):
    """Passes images on and remembers how they came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((self.training, last, x.dtype))
        return x


def run_epoch(model: nn.Module, settings: Settings) -> Trainer:
    trainer = Trainer(model, make_data(), settings, {})
    trainer.run_epoch(lambda count: None)
    return trainer


@pytest.mark.parametrize(
    ("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_amp_is_of_the_training_forward_alone(amp: str, dtype: torch.dtype) -> None:
    model = make_model()
    watch = model[3] = Watch()  # after a masked convolution
    trainer = run_epoch(model, replace(SETTINGS, amp=amp))
    assert [(training, dt) for training, _, dt in watch.seen] == [
        (True, dtype),
        (False, torch.float32),
    ]
    assert trainer.scaler.is_enabled() == (amp == "fp16")
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_gradient_is_clipped_as_it_is_without_loss_scale(amp: str) -> None:
    trainer = Trainer(make_model(), make_data(), replace(SETTINGS, amp=amp, clip_norm=0.01), {})
    if amp == "fp16":  # a scale that overflows nothing, so that the first step is taken
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    norms = []

    def note(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        norms.append(flat_gradient(trainer.model).norm().item())

    trainer.optimizer.register_step_pre_hook(note)
    trainer.train_epoch(lambda count: None)
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_no_gradient_is_left_for_the_next_step() -> None:
    trainer = run_epoch(make_model(), SETTINGS)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_channels_last_is_for_images_and_plain_weights() -> None:
    """A mask of scores that were flattened in another order would be another mask."""
    torch.manual_seed(0)
    plain = nn.Sequential(Watch(), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    run_epoch(plain, replace(SETTINGS, channels_last=True))
    assert plain[0].seen[0][:2] == (True, True)
    assert plain[1].weight.is_contiguous(memory_format=torch.channels_last)

    trained = []
    for channels_last in (False, True):
        model = make_model()
        run_epoch(model, replace(SETTINGS, channels_last=channels_last))
        trained.append(model.state_dict())
        assert model[4].scores.is_contiguous()
    for name, scores in trained[0].items():
        torch.testing.assert_close(trained[1][name], scores)


def test_compiled_is_trained_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's part of it: what the compiler behind it makes is the business of test_compile."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    trained = []
    for compiled in (False, True):
        trainer = run_epoch(make_model(), replace(SETTINGS, compile=compiled))
        assert (trainer.wrapped is trainer.model) != compiled
        trained.append(trainer.world.model_state(trainer.model))
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        assert torch.equal(trained[1][name], tensor)


def trained_weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in trainer.world.model_state(trainer.model).items()}


def test_batches_augmented_together_are_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, batch_size=5)  # five batches, the last of four images
    trained = []
    for together in (1, 3):
        monkeypatch.setattr(
            "masked_kernels.training.trainer.augmented_at_once", lambda device, n=together: n
        )
        trained.append(trained_weights(run_epoch(make_model(norm=True), settings)))
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        assert torch.equal(trained[1][name], tensor)


def test_cuda_graphs_are_for_one_cuda_device() -> None:
    with pytest.raises(ValueError, match="cuda_graphs: got 1 x cpu, expected one CUDA device"):
        Trainer(make_model(), make_data(), replace(SETTINGS, cuda_graphs=True), {})
    with pytest.raises(ValueError, match="cuda_graphs: got compile as well"):
        replace(SETTINGS, cuda_graphs=True, compile=True)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda_graphs_train_to_the_same_bits(backend: str, amp: str) -> None:
    """Batches of 8 and of 4 images, each captured and replayed."""
    device = torch.get_default_device().type
    if device != "cuda" or backend != "triton":
        pytest.skip("CUDA graphs need --device=cuda and the backend triton")
    settings = replace(SETTINGS, epochs=5, batch_size=8, amp=amp, momentum=0.9)
    trained = []
    for cuda_graphs in (False, True):
        data, model = make_data(28).to(device), make_model(norm=True).to(device)
        trainer = Trainer(model, data, replace(settings, cuda_graphs=cuda_graphs), {})
        with mk.use_backend(backend):
            losses = [trainer.run_epoch(lambda count: None)["train_loss"] for _ in range(5)]
        assert len(set(losses)) == 5
        trained.append((losses, trained_weights(trainer)))
        assert trainer.graphs is None or len(trainer.graphs.captured) == 2
    assert trained[0][0] == trained[1][0]
    for name, tensor in trained[0][1].items():
        assert torch.equal(trained[1][1][name], tensor)
