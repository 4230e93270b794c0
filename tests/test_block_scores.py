"""Scores one block at a time against those of a resident module: before and after rounding, text and tasks."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aqtx
from aqtx.blockwise.block_scores import BlockScorer
from aqtx.errors import InputError
from aqtx.evaluate.arms import _generator
from aqtx.evaluate.perplexity import evaluate_perplexity
from aqtx.machine.tensor_record import load_tensors, save_tensors
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize
from aqtx.program.blocks import Block
from aqtx.program.program import Program
from aqtx.runs.pipeline import run
from aqtx.text.tokens import Document
from tests.tiny import write_checkpoint

SIZES = (70, 9, 70, 33, 128, 2)


def documents(vocabulary: int) -> list[Document]:
    generator = torch.Generator().manual_seed(2)
    return [Document("text", torch.randint(0, vocabulary, (size,), generator=generator)) for size in SIZES]


@pytest.fixture(params=["as it is", "rounded", "emitted"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Program:
    traced = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    plan = AssignPlan(method="error", candidates=("mxfp4", "mxfp8"), average_bits=6.0, keep=("lm_head",))
    steps = {"as it is": [], "rounded": [plan, Quantize()], "emitted": [plan, Quantize(), Emit()]}
    return run(traced, steps[request.param])


@pytest.mark.parametrize("room", [0, 1 << 40], ids=["streams", "resident"])
def test_scores_are_those_of_the_module(program: Program, room: int) -> None:
    """Logits are of order 1 and sums of K = 128 products: 1e-5 is eps sqrt(128) with room for two layers."""
    texts, scorer = documents(192), BlockScorer(program, room)
    assert scorer.streams == (room == 0)
    found = evaluate_perplexity(scorer, texts, window=64, batch_size=3)
    expected = evaluate_perplexity(program.module(), texts, window=64, batch_size=3)
    assert found.nll / found.num_tokens == pytest.approx(expected.nll / expected.num_tokens, rel=1e-5)
    assert (found.num_tokens == expected.num_tokens).all()


@pytest.mark.parametrize("work", [False, True])
def test_logits_come_in_the_order_of_the_batches(tmp_path: Path, work: bool) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 192, shape, generator=generator) for shape in ((2, 8), (1, 31), (3, 8), (2, 8))]
    scorer, module = BlockScorer(program, 0, tmp_path / "work" if work else None), program.module()
    found = list(scorer.many(batches))
    for ids, logits in zip(batches, found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, module(ids), rtol=1e-4, atol=1e-4)
    assert not any((tmp_path / "work").rglob("*.stream"))


def test_one_block_of_weights_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight once, whatever the number of batches, in the order of the layers."""
    program = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    read: list[str] = []
    get = type(program.weights).get

    def watched(store: object, name: str) -> Tensor:
        read.append(name)
        return get(store, name)  # type: ignore[arg-type]

    monkeypatch.setattr(type(program.weights), "get", watched)
    list(BlockScorer(program, 0).many([torch.zeros(1, 8, dtype=torch.long) + index for index in range(5)]))
    assert sorted(read) == sorted(program.weights.names())
    layers = [int(name.split(".")[2]) for name in read if name.startswith("model.layers.")]
    assert layers == sorted(layers)


def test_generation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    with pytest.raises(InputError, match=r"needs the whole model in memory.*raise max_memory"):
        _generator(program, BlockScorer(program, 0))


@pytest.mark.parametrize("room", [0, 1 << 15], ids=["on disk", "in memory"])
def test_a_killed_evaluation_goes_on_with_the_next_block(program: Program, tmp_path: Path, room: int) -> None:
    """The blocks done are not read again, the scores are equal to the last bit, and nothing is left."""
    texts, work = documents(192), tmp_path / "work"
    expected = evaluate_perplexity(BlockScorer(program, room), texts, window=64, batch_size=3)
    scorer = BlockScorer(program, room, work, record="scores")

    def stops(blocks: Iterable[Block], **_: object) -> Iterator[Block]:
        for done, block in enumerate(blocks):
            if done == 2:
                raise KeyboardInterrupt
            yield block

    with pytest.raises(KeyboardInterrupt):
        evaluate_perplexity(replace(scorer, progress=stops), texts, window=64, batch_size=3)
    seen: list[Block] = []

    def watched(blocks: Iterable[Block], **_: object) -> Iterator[Block]:
        for block in blocks:
            seen.append(block)
            yield block

    found = evaluate_perplexity(replace(scorer, progress=watched), texts, window=64, batch_size=3)
    assert (found.nll == expected.nll).all()
    assert len(seen) == len(scorer.blocks) - 1 - 2
    assert not list(work.iterdir())


def test_a_damaged_record_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "record.safetensors"
    save_tensors(file, {"one": torch.arange(6.0).bfloat16(), "two": torch.zeros(0, 3)}, {"block": 3})
    tensors, told = load_tensors(file) or ({}, None)
    assert told == {"block": 3} and torch.equal(tensors["one"], torch.arange(6.0).bfloat16())
    whole = file.read_bytes()
    for place in (10, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert load_tensors(file) is None
    file.write_bytes(whole[:-5])
    assert load_tensors(file) is None
