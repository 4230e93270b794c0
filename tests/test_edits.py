"""Structural edits as records: a kind made on the fly replays, is saved, exported and undone like the built-in ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.errors import InputError
from aqtx.program.edits import (
    KINDS,
    Edit,
    Hadamard,
    Operation,
    QuantizeActivation,
    RemoveHadamard,
    edit_from_json,
    edit_kind,
    in_force,
)
from aqtx.program.inserted_ops import INSERTED_OPS, Step
from tests.tiny import write_checkpoint

WEIGHT = "model.layers.0.self_attn.v_proj.weight"


@torch.library.custom_op("tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    """2 x."""
    return 2 * x


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def doubling() -> Iterator[type[Edit]]:
    """A new kind: one record."""

    @edit_kind("double_input")
    @dataclass(frozen=True, kw_only=True)
    class DoubleInput(Edit):
        """x -> 2 x -> linear."""

        ops: ClassVar[tuple[Any, ...]] = (torch.ops.tests.double.default,)

        def step(self, graph_module: fx.GraphModule, node: fx.Node) -> Step:
            return torch.ops.tests.double.default, ()

        def operation(self, buffer: Callable[[str], Tensor]) -> Operation:
            return lambda x, offsets: double(x)

        def undo(self, matrix: Tensor) -> Tensor:
            return 2 * matrix

    yield DoubleInput
    del KINDS["double_input"]
    INSERTED_OPS.discard(torch.ops.tests.double.default)


def test_a_new_kind_of_edit_is_one_record(doubling: type[Edit], tmp_path: Path) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    ids = torch.randint(0, 192, (2, 7))
    plain = program.module()(ids)
    program.edit(doubling(weight=WEIGHT))
    doubled = program.module()(ids)
    assert not torch.allclose(doubled, plain)
    aqtx.save(program, tmp_path / "saved")
    loaded = aqtx.load(tmp_path / "saved")
    assert loaded.edits == [doubling(weight=WEIGHT)]
    assert torch.equal(loaded.module()(ids), doubled)
    export(tmp_path / "saved", "dequantized", tmp_path / "plain", dtype=torch.float32)
    undone = aqtx.load(tmp_path / "plain")
    assert undone.edits == []
    assert torch.equal(undone.weights.get(WEIGHT), 2 * program.weights.get(WEIGHT))
    assert torch.equal(undone.module()(ids), doubled)  # a factor of 2 is exact


def test_a_kind_is_registered_once(doubling: type[Edit]) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        edit_kind("double_input")(doubling)


def test_a_rotation_comes_before_a_quantization_and_is_removed_alone() -> None:
    quantize, rotate = QuantizeActivation(weight="w", formats=("mxfp4",)), Hadamard(weight="w", block=32)
    assert in_force([quantize, rotate]) == [rotate, quantize]
    assert in_force([quantize, rotate, RemoveHadamard(weight="w")]) == [quantize]


@pytest.mark.parametrize(
    "edit", [QuantizeActivation(weight="w", formats=("mxfp4", "")), Hadamard(weight="w", block=32, seed=3)]
)
def test_records_survive_json(edit: Edit) -> None:
    assert edit_from_json(edit.to_json()) == edit


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ("hadamard", "must be an object"),
        ({"edit": 3}, "must be an object"),
        ({"edit": "hadamar", "weight": "w"}, "did you mean 'hadamard'"),
        ({"edit": "hadamard", "weight": "w"}, "expected weight, block, seed"),
    ],
)
def test_a_record_that_is_none_is_told(told: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        edit_from_json(told)
