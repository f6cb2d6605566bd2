"""What test_distributed.py runs under torchrun: ``checks``, on three processes; ``runs FOLDER``, on
two; ``train FOLDER ...``, which is examples/train.py but leaves its process number in the folder.
"""

import copy
import os
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import train
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import masked_kernels as mk
from masked_kernels import distributed as md
from masked_kernels.nn import MaskedLinear
from masked_kernels.training import (
    ImageDataset,
    Normalize,
    Settings,
    Splits,
    World,
    best_record,
    evaluate,
    fit,
)
from masked_kernels.training.checkpoint import load_checkpoint
from masked_kernels.training.launch import leave, open_world
from masked_kernels.training.processes import Replicas, Shards

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 1, 6, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(12, 1, generator=GENERATOR, dtype=torch.float64)
RECIPES = {
    "random_padding": mk.recipes.random_padding(0.1),
    "one_layer": mk.recipes.one_layer(0.3),
    "threshold": mk.MaskConfig(rule=mk.Threshold(0.0, rescale=True), values="random"),
    "nm": mk.MaskConfig(rule=mk.NM(1, 4), values="random"),
}


def make_model(recipe: str, seed: int = 0) -> nn.Sequential:
    """Layers of 5, 7 and 1 rows, for 2 and 3 processes: uneven and empty shards."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(80),
        nn.Linear(80, 7),
        nn.ReLU(),
        nn.Linear(7, 1),
    ).double()
    mk.mask_model_(model, RECIPES[recipe], seed=seed)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def mean_loss(model: nn.Module, rank: int = 0, size: int = 1) -> Tensor:
    """Of this rank's share, weighted so that the mean over ranks is that of all 12."""
    return F.mse_loss(model(X[rank::size]), Y[rank::size], reduction="sum") * size / len(X)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, rank=0, size=1) -> list:
    """Losses, of all ranks' images, before each step."""
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = mean_loss(model, rank, size)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach() / size)
    return losses


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.mask.words for n, m in model.named_modules() if hasattr(m, "scores")}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_same_on_all_ranks(tensors: dict[str, Tensor], size: int) -> None:
    for name, tensor in tensors.items():
        of_ranks = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(of_ranks, tensor.contiguous())
        assert all(torch.equal(t, of_ranks[0]) for t in of_ranks), name


def summed(losses: list[Tensor], group=None) -> Tensor:
    total = torch.stack(losses)
    dist.all_reduce(total, group=group)
    return total


# --- select_rows ---------------------------------------------------------------------------------


def random_scores(rng: random.Random, generator: torch.Generator) -> Tensor:
    rows = rng.choice([0, 1, 1, 2, 3, 5, 17, 64])
    shape = [rows, *rng.choice([(1,), (31,), (32,), (33,), (3, 3, 3), (100,), (0,)])]
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    match rng.choice(["random", "ties", "equal", "zeros", "extreme"]):
        case "ties":
            scores = (scores * 2).round() / 2
        case "equal":
            scores = torch.full(shape, -0.5, dtype=torch.float64)
        case "zeros":
            scores = torch.where(scores > 0, 0.0, -0.0)
        case "extreme":
            scores = torch.where(scores > 1, scores * torch.inf, scores * 1e-310)
    return scores.to(
        rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    )


def check_select_rows(group: dist.ProcessGroup, rank: int, size: int) -> None:
    rng, generator = random.Random(size), torch.Generator().manual_seed(size)
    densities = (0.0, 0.1, 0.5, 0.77, 1.0)
    checked = 0
    for _ in range(30):
        whole, rules, own = [], [], []
        for _ in range(rng.randrange(1, 6)):
            scores = random_scores(rng, generator)
            rows = len(scores)
            cuts = [0, *sorted(rng.randrange(rows + 1) for _ in range(size - 1)), rows]
            whole.append(scores)
            own.append(scores[cuts[rank] : cuts[rank + 1]])
            topk = mk.TopK(rng.choice(densities), absolute=rng.random() < 0.5)
            rules.append(rng.choice([topk, topk, topk, mk.Threshold(0.1), mk.NM(1, 3)]))
        chosen = md.select_rows(own, rules, group)
        for scores, rule, words in zip(whole, rules, chosen, strict=True):
            assert torch.equal(words, rule.select(scores)), (scores.shape, scores.dtype, rule)
            checked += 1
    assert checked > 60


def check_select_rows_errors(rank: int) -> None:
    scores = torch.ones(rank + 1, 2)
    for rule in (mk.TopK(), mk.Threshold(), mk.NM()):
        bad = scores.clone()
        if rank == 1:
            bad[1, 0] = torch.nan  # after the one row of rank 0 and one of its own
        raises(ValueError, r"scores\[1\]: NaN at flat index 4, on rank 1", scores, bad, rule)
    raises(TypeError, r"rules\[1\]: got object, expected TopK", scores, scores, object())
    raises(ValueError, r"scores\[1\]: got shape \(2,\)", scores, torch.ones(2), mk.TopK())
    assert md.select_rows([], []) == []


def raises(error: type[Exception], message: str, first: Tensor, second: Tensor, rule) -> None:
    with pytest.raises(error, match=message):
        md.select_rows([first, second], [mk.TopK(), rule])


# --- models --------------------------------------------------------------------------------------


def check_gradients_and_steps(recipe: str, mesh: DeviceMesh, rank: int, size: int) -> None:
    """Shards and copies do what one process does, in float64; their masks are the same bits."""
    single = make_model(recipe)
    sharded, copied = (make_model(recipe, seed=0 if rank == 0 else 9) for _ in range(2))
    md.shard_model_(sharded, mesh)
    replicated = md.replicate(copied, mesh.get_group())
    assert_same(masks(sharded), masks(single))
    scores = dict(sharded.named_parameters())["4.scores"]
    assert scores.to_local().shape == (len(torch.arange(7).chunk(size)[rank]), 80)

    mean_loss(single).backward()
    mean_loss(replicated, rank, size).backward()
    for piece in range(2):  # accumulated, only the last one made equal
        sharded.set_requires_gradient_sync(piece == 1)
        own = slice(rank, None, size)
        loss = F.mse_loss(sharded(X[own][piece::2]), Y[own][piece::2], reduction="sum")
        (loss * size / len(X)).backward()
    expected = {n: p.grad for n, p in single.named_parameters() if p.requires_grad}
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.pop(name))
    assert not expected

    models = (single, sharded, replicated)
    optimizers = [make_optimizer(model) for model in models]
    losses = [
        steps(model, optimizer, 3, *place)
        for model, optimizer, place in zip(
            models, optimizers, ((0, 1), (rank, size), (rank, size)), strict=True
        )
    ]
    for of_rank in losses[1:]:
        torch.testing.assert_close(summed(of_rank, mesh.get_group()), torch.stack(losses[0]))
    assert_same(masks(sharded), masks(single))
    assert_same(masks(copied), masks(single))
    for layer, whole in ((sharded[4], single[4]), (copied[4], single[4])):
        torch.testing.assert_close(layer.smallest_kept(), whole.smallest_kept())
    moments = optimizers[1].state[dict(sharded.named_parameters())["4.scores"]]["exp_avg"]
    assert isinstance(moments, DTensor) and moments.to_local().shape == scores.to_local().shape


def check_frozen_values_stay_at_home(rank: int) -> None:
    model = make_model("random_padding")
    replicated = md.replicate(model)
    model[0].prototype.values.add_(rank)
    before = model[0].prototype.values.clone()
    steps(replicated, make_optimizer(replicated), 2)
    assert torch.equal(model[0].prototype.values, before)


def check_a_plain_model_in_channels_last() -> None:
    model, whole = (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    md.shard_model_(model)
    md.load_model_state(model, whole.state_dict())
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(images), whole(images))


def check_masks_follow_the_scores(rank: int) -> None:
    model = make_model("random_padding")
    shared = MaskedLinear(1, 1, bias=False).double()
    model.extend([shared, nn.Tanh(), shared])
    whole = copy.deepcopy(model)
    md.shard_scores_(model)
    with torch.no_grad():
        for changed in (model, whole):
            changed[4].scores.mul_(-1).add_(1)
    assert not torch.equal(model[4].mask.words, whole[4].mask.words)
    md.select_masks_(model)
    assert_same(masks(model), masks(whole))
    for rows in range(1 + rank):  # no collectives in a forward: each rank as many as it likes
        torch.testing.assert_close(model(X[:rows]), whole(X[:rows]))

    with torch.no_grad():
        whole[4].scores.copy_(whole[4].scores.flip(0, 1))
    assert not torch.equal(model[4].mask.words, whole[4].mask.words)
    md.load_model_state(model, whole.state_dict())
    assert_same(masks(model), masks(whole))
    gathered = md.gather_state(model.state_dict())
    if rank == 0:
        assert_same(gathered, whole.state_dict())

    scores = dict(model.named_parameters())["6.scores"]  # one row: rank 0 has it
    scores.grad = torch.full_like(scores, torch.nan)
    with pytest.raises(ValueError, match=r"NaN at flat index 0, on rank 0"):
        torch.optim.SGD([scores], lr=1.0).step()

    with pytest.raises(ValueError, match="without MaskedLinear or MaskedConv2d"):
        md.shard_scores_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="without sharded scores"):
        md.select_masks_(whole)
    with pytest.raises(ValueError, match="mesh: got 2 dimensions"):
        md.shard_scores_(make_model("nm"), DeviceMesh("cpu", [[0, 1, 2]]))


def check_states_move(two: DeviceMesh, three: DeviceMesh, rank: int) -> None:
    """Two processes, then three, then one: equal masks at once, and equal losses from there on."""
    state = expected = None
    if rank < 2:
        model = make_model("one_layer")
        md.shard_model_(model, two)
        optimizer = make_optimizer(model)
        steps(model, optimizer, 3, rank, 2)
        state = [md.gather_state(part.state_dict()) for part in (model, optimizer)]
        state = copy.deepcopy(state)  # of what it shares with the optimizer
        chosen = masks(model)
        expected = (
            chosen,
            summed(steps(model, optimizer, 3, rank, 2), two.get_group()),
            masks(model),
        )
    (state, expected) = broadcast([state, expected])

    model = make_model("one_layer", seed=3)
    md.shard_model_(model, three)
    optimizer = make_optimizer(model)
    md.load_model_state(model, state[0])
    md.load_optimizer_state(optimizer, state[1])
    assert_same(masks(model), expected[0])
    torch.testing.assert_close(summed(steps(model, optimizer, 2, rank, 3)), expected[1][:2])
    state = broadcast([md.gather_state(part.state_dict()) for part in (model, optimizer)])
    chosen = masks(model)

    model = make_model("one_layer", seed=4)
    optimizer = make_optimizer(model)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert_same(masks(model), chosen)
    torch.testing.assert_close(torch.stack(steps(model, optimizer, 1)), expected[1][2:])
    assert_same(masks(model), expected[2])


def broadcast(made: list) -> list:
    dist.broadcast_object_list(made, src=0)
    return made


# --- the training loop ---------------------------------------------------------------------------


def check_fit(world: World, folder: Path) -> None:
    """50 images in batches of 16, of which 2 are left over: too few for 3 processes. Shares of 6, 5
    and 5 images go through in 5 pieces.
    """

    def part(count: int) -> ImageDataset:
        labels = torch.arange(count) % 2
        noise = torch.randint(
            0, 60, (count, 1, 6, 6), generator=torch.Generator().manual_seed(count)
        )
        return ImageDataset((noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(8 * 16, 2, bias=False))
        mk.mask_model_(model, mk.recipes.random_padding(0.1), seed=seed)
        return model

    data = Splits("squares", ("dark", "bright"), (0.4,), (0.3,), part(50), part(20), part(30))
    settings = Settings(epochs=2, batch_size=16, lr=0.02, accumulate=6, clip_norm=1.0)
    model = build(0)
    records = fit(model, data, settings, folder, progress=False, world=world)
    assert_same_on_all_ranks(masks(model), world.size)
    assert_same_on_all_ranks({n: b for n, b in model.named_buffers() if "running" in n}, world.size)
    results = [(r["train_loss"], r["val_accuracy"], r["layers"]) for r in records]
    assert all(of_rank == results for of_rank in gather(results))
    whole = world.whole(model, lambda: build(1))
    assert (whole is not None) == world.is_main
    if whole is not None:
        assert_same(masks(whole), masks(model))
        assert not any(isinstance(p, DTensor) for p in whole.parameters())
        # Every process validated by the statistics that are saved.
        val = evaluate(whole, data.val, Normalize(data.mean, data.std))
        assert val.loss == pytest.approx(best_record(records)["val_loss"], rel=1e-5)
        one = build(2)
        again = fit(one, data, settings, folder, resume=True, progress=False)
        assert again == records
        assert_same(masks(one), masks(model))


def gather(made: object) -> list:
    of_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, made)
    return of_ranks


def checks(folder: Path) -> None:
    with pytest.raises(ValueError, match="got 'none', expected ddp or fsdp under torchrun"):
        open_world("none", "cpu").__enter__()
    with open_world("ddp", "cpu", timeout=60) as world:
        rank = world.rank
        two, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])
        for mesh in (two, three):
            if rank < mesh.size():
                check_select_rows(mesh.get_group(), rank, mesh.size())
                for recipe in RECIPES if mesh is three else ["random_padding"]:
                    check_gradients_and_steps(recipe, mesh, rank, mesh.size())
        check_select_rows_errors(rank)
        check_frozen_values_stay_at_home(rank)
        check_a_plain_model_in_channels_last()
        check_masks_follow_the_scores(rank)
        check_states_move(two, three, rank)
        check_fit(Replicas(), folder / "ddp")
        check_fit(Shards(), folder / "fsdp")


def run_arguments(parallel: str, out: Path) -> list[str]:
    """Of examples/train.py: ten epochs of digits, with BatchNorm, augmentation and a last batch of
    another size.
    """
    model = ["--model-args", "dim=16", "depth=1", "--threads", "1", "--quiet"]
    data = ["--limit-train", "150", "--limit-test", "40", "--batch-size", "32", "--epochs", "10"]
    return [*model, *data, "--parallel", parallel, "--out", str(out)]


def runs(folder: Path) -> None:
    """Go on with the run that lost a process; the same undisturbed; then one of copies."""
    with open_world("fsdp", "cpu", timeout=60) as world:

        def run(name: str, *more: str, world: World = world) -> dict:
            train.run(train.parse_arguments([*run_arguments("fsdp", folder / name), *more]), world)
            return load_checkpoint(folder / name / "checkpoint.pt")

        cut, whole = run("cut", "--resume"), run("whole")
        for part in ("model", "best_weights"):
            assert_same(cut[part], whole[part])
        for slot, values in whole["optimizer"]["state"].items():
            assert_same(cut["optimizer"]["state"][slot], values)
        copies = run("copies", "--epochs", "1", world=Replicas())
        assert copies["model"].keys() == whole["model"].keys()
        assert (folder / "copies" / "model.safetensors").exists() or not world.is_main


def main() -> int:
    command, folder, *arguments = sys.argv[1:]
    if command == "train":
        Path(folder, f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
        return train.main(arguments)
    {"checks": checks, "runs": runs}[command](Path(folder))
    return 0


if __name__ == "__main__":
    leave(main())
