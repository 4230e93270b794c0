"""Tensors put together on reading, against torch doing the same to whole ones; conversions against transformers'."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from aqtx.checkpoint.huggingface.conversions import Target, convert
from aqtx.checkpoint.pieces import Joined, Piece, Stacked, stored
from aqtx.errors import InputError


def leaf(value: Tensor, reads: list[int] | None = None) -> Piece:
    """A stored tensor; `reads` collects how many numbers each reading asks for."""

    def fetch(key: str, parts: tuple[range, ...]) -> Tensor:
        found = value[tuple(slice(part.start, part.stop, part.step) for part in parts)]
        if reads is not None:
            reads.append(found.numel())
        return found

    return stored(fetch, "t", tuple(value.shape))


def grown(rng: random.Random) -> tuple[Piece, Tensor]:
    """A random piece of three dimensions and the tensor that it stands for."""
    shape = tuple(rng.randint(2, 5) for _ in range(3))
    value = torch.arange(torch.Size(shape).numel()).view(shape)
    piece = leaf(value)
    for _ in range(rng.randint(1, 6)):
        dim, kind = rng.randrange(3), rng.choice(("join", "stack", "turn", "cut", "select"))
        if kind == "join":
            piece, value = Joined((piece, piece), dim), torch.cat([value, value], dim)
        elif kind == "stack":
            piece, value = Stacked((piece, piece, piece), dim).select(0, 0), torch.stack([value] * 3, dim).select(0, 0)
        elif kind == "turn":
            piece, value = piece.transpose(dim, (dim + 1) % 3), value.transpose(dim, (dim + 1) % 3)
        elif kind == "cut":
            piece, value = piece.chunk(2, dim)[0], value.chunk(2, dim)[0]
        else:
            start, step = rng.randrange(value.shape[0]), rng.randint(1, 3)
            piece, value = piece[slice(start, None, step),], value[start::step]
    return piece, value


def test_any_tree_of_pieces_reads_as_torch_computes_it() -> None:
    rng = random.Random(0)
    for _ in range(300):
        piece, value = grown(rng)
        assert piece.shape == tuple(value.shape)
        assert torch.equal(piece.read(), value)
        dim = rng.randrange(3)
        index = rng.randrange(value.shape[dim])
        assert torch.equal(piece.select(dim, index).read(), value.select(dim, index))


def test_only_what_is_asked_for_is_read() -> None:
    reads: list[int] = []
    fused = Joined(tuple(Stacked(tuple(leaf(torch.randn(6, 4), reads) for _ in range(8)), 0) for _ in range(2)), 1)
    gate, _ = fused.chunk(2, 1)
    gate.select(0, 3).read()
    assert reads == [24]


def expected(rule: Any, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """What transformers' own operations make."""
    found: Any = {pattern: list(values) for pattern, values in tensors.items()}
    for operation in rule.operations:
        found = operation.convert(found, source_patterns=rule.source_patterns, target_patterns=rule.target_patterns)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def rules() -> dict[str, tuple[Any, list[tuple[int, ...]], int]]:
    """Name -> rule, shapes of the tensors of its patterns, how many tensors a pattern."""
    from transformers.core_model_loading import (
        Chunk,
        Concatenate,
        Interleave,
        MergeModulelist,
        SplitModulelist,
        Transpose,
        WeightConverter,
    )

    gate_up = ["e.*.gate", "e.*.up"]
    fuse = [MergeModulelist(0), Concatenate(1)]
    return {
        "experts fused": (WeightConverter(gate_up, "e.gate_up", fuse), [(6, 4), (6, 4)], 5),
        "experts fused and turned": (WeightConverter(gate_up, "e.gate_up", [*fuse, Transpose(1, 2)]), [(6, 4)] * 2, 3),
        "experts parted": (WeightConverter("e.down", "e.*.down", [SplitModulelist(0)]), [(5, 4, 6)], 1),
        "gate and up parted": (
            WeightConverter("e.gate_up", list(gate_up), [Chunk(1), SplitModulelist(0)]),
            [(5, 6, 4)],
            1,
        ),
        "heads parted": (WeightConverter("qkv", ["q", "k", "v"], [Chunk(0)]), [(9, 4)], 1),
        "pairs parted": (WeightConverter("w13", ["w1", "w3"], [Interleave(0), Chunk(0)]), [(8, 4)], 1),
        "turned": (WeightConverter("w", "v", [Transpose(0, 1)]), [(8, 4)], 1),
    }


@pytest.mark.parametrize("name", list(rules()))
def test_conversions_are_transformers_own(name: str) -> None:
    rule, shapes, count = rules()[name]
    tensors = {
        pattern: [torch.randn(shape) for _ in range(count)]
        for pattern, shape in zip(rule.source_patterns, shapes, strict=True)
    }
    pieces = {pattern: [leaf(value) for value in values] for pattern, values in tensors.items()}
    made = convert(Target(rule, rule.target_patterns[0], {}, None), pieces)
    wanted = expected(rule, tensors)
    assert made.keys() == wanted.keys()
    assert [key for key, piece in made.items() if not torch.equal(piece.read(), wanted[key])] == []


def test_an_operation_that_is_not_known_is_refused_by_name() -> None:
    from transformers.core_model_loading import PermuteForRope, WeightConverter

    rule = WeightConverter("wq", "q", [PermuteForRope()])
    with pytest.raises(InputError, match="q is made by transformers' PermuteForRope, which aqtx cannot do piece by"):
        convert(Target(rule, "q", {}, None), {"wq": [leaf(torch.randn(4, 4))]})


def test_tensors_that_do_not_go_together_are_named() -> None:
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    rule = WeightConverter("e.*.w", "e.w", [MergeModulelist(0)])
    with pytest.raises(InputError, match=r"layer\.e\.w cannot be put together by MergeModulelist: tensors of 2 shapes"):
        convert(Target(rule, "layer.e.w", {}, None), {"e.*.w": [leaf(torch.ones(2, 3)), leaf(torch.ones(3, 3))]})
