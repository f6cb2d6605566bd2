"""PackedMask: layout, round trips, set algebra, errors."""

import copy
import pickle

import oracle
import pytest
import torch
from cases import MASKS, make_mask
from hypothesis import given
from hypothesis import strategies as st

import masked_kernels as mk
from masked_kernels import _ops

SHAPES = [
    (),
    (0,),
    (1,),
    (33,),
    (0, 5),
    (5, 0),
    (1, 1),
    (3, 31),
    (3, 32),
    (3, 33),
    (2, 63),
    (2, 64),
    (2, 65),
]
SHAPES += [(4, 3, 3, 3), (6, 1, 5, 5), (37, 129)]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_and_round_trips(shape: tuple[int, ...], kind: str, backend: str) -> None:
    mask = make_mask(kind, shape)
    rows = (
        mask.reshape(1, -1)
        if mask.dim() < 2
        else mask.reshape(shape[0], torch.Size(shape[1:]).numel())
    )
    with mk.use_backend(backend):
        packed = mk.PackedMask.from_bool(mask)
        assert packed.words.dtype == torch.int32
        assert packed.words.tolist() == oracle.pack(rows.tolist())
        assert torch.equal(packed.unpack(), mask)
        assert packed.count() == int(mask.sum())
        assert packed.density() == int(mask.sum()) / max(mask.numel(), 1)
        assert torch.equal(packed.transpose().unpack(), rows.t())
        assert packed.transpose().words.tolist() == oracle.pack(rows.t().tolist())
        data = packed.to_bytes()
        assert len(data) == (mask.numel() + 7) // 8
        assert mk.PackedMask.from_bytes(data, shape) == packed.to("cpu")


def test_worked_example() -> None:
    """One row of 40 bits with bits 0, 5, 31, 32 and 39 set, as docs/format.md works it out."""
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, [0, 5, 31, 32, 39]] = True
    packed = mk.PackedMask.from_bool(mask)
    assert [word & 0xFFFFFFFF for word in packed.words[0].tolist()] == [0x80000021, 0x00000081]
    assert packed.to_bytes() == bytes([0x21, 0x00, 0x00, 0x80, 0x81])


@given(st.integers(1, 5), st.integers(1, 100), st.randoms(use_true_random=False))
def test_set_algebra(rows: int, cols: int, random) -> None:
    a, b = (
        torch.tensor([[random.random() < 0.4 for _ in range(cols)] for _ in range(rows)])
        for _ in range(2)
    )
    p, q = mk.PackedMask.from_bool(a), mk.PackedMask.from_bool(b)
    for got, expected in ((p & q, a & b), (p | q, a | b), (p ^ q, a ^ b), (~p, ~a)):
        assert got == mk.PackedMask.from_bool(expected)
    union = int((a | b).sum())
    assert p.iou(q) == (int((a & b).sum()) / union if union else 1.0)


def test_equality_and_immutability() -> None:
    mask = torch.rand(3, 33) < 0.5
    packed = mk.PackedMask.from_bool(mask)
    assert packed == mk.PackedMask.from_bool(mask.clone())
    assert packed != ~packed
    assert packed != mk.PackedMask.from_bool(mask.t())
    assert packed != "mask"
    before = packed.words.clone()
    assert (~packed).words is not packed.words
    assert torch.equal(packed.words, before)
    for attribute in ("words", "shape", "other"):
        with pytest.raises(AttributeError):
            setattr(packed, attribute, None)


def test_copies_and_devices() -> None:
    packed = mk.PackedMask.from_bool(torch.rand(3, 33) < 0.5)
    assert copy.deepcopy(packed) == packed
    assert pickle.loads(pickle.dumps(packed)) == packed
    assert packed.to("cpu") == packed
    assert packed.to("meta").device.type == "meta"
    assert repr(packed).startswith("PackedMask(shape=(3, 33), density=0.")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: mk.PackedMask.from_bool(torch.ones(3)),
            TypeError,
            "mask: got dtype torch.float32",
        ),
        (lambda: mk.PackedMask.from_bool([True]), TypeError, "mask: got list, expected Tensor"),
        (
            lambda: mk.PackedMask(torch.zeros(3, 1), (3, 8)),
            TypeError,
            "words: got dtype torch.float32",
        ),
        (
            lambda: mk.PackedMask(torch.zeros(3, 1, dtype=torch.int32), (3, 33)),
            ValueError,
            r"words: got shape \(3, 1\), expected \(3, 2\)",
        ),
        (
            lambda: mk.PackedMask.from_bytes(b"\x01", (3, 3)),
            ValueError,
            "data: got 1 bytes, expected 2",
        ),
        (
            lambda: mk.PackedMask.from_bytes(b"\x10", (4,)),
            ValueError,
            "data: got set bits after bit 4",
        ),
        (
            lambda: (
                mk.PackedMask.from_bool(torch.ones(2, 3).bool())
                & mk.PackedMask.from_bool(torch.ones(6).bool())
            ),
            ValueError,
            r"other: got shape \(6,\), expected \(2, 3\)",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_popcount_by_row(backend: str) -> None:
    mask = torch.rand(9, 77) < 0.3
    words = _ops.pack(mask, backend)
    assert torch.equal(_ops.popcount(words, backend), mask.sum(1))
