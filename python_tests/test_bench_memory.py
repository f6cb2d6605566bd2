"""The peak of memory of a training step: counted exactly, and told per masked weight."""

import pytest
import torch
from torch import nn

from bench import memory
from bench.nets import TOYS, masked_weights


def test_allocated_peak_is_what_lives_at_once() -> None:
    def run() -> None:
        kept = torch.zeros(1000)
        kept + torch.zeros(3000)[:1000]
        torch.zeros(2000)

    run()
    assert memory.allocated_peak(run) == 4 * (1000 + 3000 + 1000)


def test_state_counts_shared_memory_once() -> None:
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    second.weight = nn.Parameter(first.weight[:2])
    second.bias = first.bias
    assert memory.state_bytes(nn.ModuleList([first, second])) == 4 * (32 + 4)


def test_a_step_holds_at_least_the_state_and_its_gradients() -> None:
    net = TOYS[0]
    found = memory.measure(net, "dense eager", 2)
    weights = sum(p.numel() for p in net.create().parameters())
    assert found["tensors"] > 2 * 4 * weights
    assert found["process"] >= 0


def test_differences_are_from_dense() -> None:
    net = {
        "masked_weights": masked_weights(TOYS[0]),
        "batches": {
            "2": {
                "ours": {"tensors": 12_000, "process": 2_000_000},
                "dense eager": {"tensors": 10_000, "process": 1_000_000},
            }
        },
    }
    weights = 3 * 8 * 4 + 8 * 25 + 8 * 8 + 80
    assert net["masked_weights"] == weights
    page = memory.render({"nets": {"Net": net}})
    per_weight, more = 12_000 / weights, 2000 / weights
    assert f"| Net | 2 | `ours` | 0.0 | 2.0 | {per_weight:.1f} | {more:+.1f} |" in page
    assert "| Net | 2 | `dense eager` | 0.0 | 1.0 |" in page


def test_unknown_networks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--nets", "LeNet"])
    assert "LeNet" in capsys.readouterr().err
