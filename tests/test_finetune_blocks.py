"""Training one block at a time against training with the whole model in memory: losses, gradients, what is reported."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aqtx.checkpoint.open import trace
from aqtx.finetune.chain import Chain
from aqtx.finetune.losses import LossWeights
from aqtx.finetune.routed import Outputs, Scores, routed
from aqtx.finetune.student import student_of
from aqtx.finetune.targets import targets_of
from aqtx.formats import quantize
from aqtx.passes.distill import Distill
from aqtx.passes.unfreeze import Unfreeze
from aqtx.program.edits import QuantizeActivation
from aqtx.program.program import Program
from aqtx.registry import Changes, Context
from tests.foreign_models import foreign
from tests.marks import slow
from tests.tiny import OLMOE, random_model

LLAMA = OLMOE | {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True}
PARTS = {"olmoe": ("router", "norm", "attention"), "llama": ("norm", "bias"), "qwen3_moe": ("router",)}


def rounded(family: str) -> Program:
    """Experts and last products in int4, the first behind quantized activations, one shrunk so that training helps."""
    configs = {"olmoe": OLMOE, "llama": LLAMA}
    model = random_model(configs[family], dtype=torch.float32) if family in configs else foreign(family)
    program = trace(model, dtype=torch.float32)
    sites = [site for site in program.sites() if site.category.startswith("mlp")]
    for site in sites:
        site.set("format", "int4")
        shrunk = 0.5 if site.layer == 0 and site.category == "mlp_down" else 1.0
        program.codes[site.name] = quantize(program.read(site) * shrunk, "int4")
    program.edit(QuantizeActivation(weight=sites[0].weight, formats=("mxfp8",)))
    Unfreeze(what=PARTS[family]).run(program, Context(quiet=True))
    return program


def losses_and_gradients(student: Scores, start: dict[str, Tensor], ids: Tensor, told: Outputs) -> list[Tensor]:
    loss, weights = LossWeights(0.5, 1.0, 0.5), {name: value.clone().requires_grad_() for name, value in start.items()}

    def head(outputs: Outputs, part: slice) -> Tensor:
        rows = slice(part.start * ids.shape[1], part.stop * ids.shape[1])
        return loss(outputs, (told[0][part], tuple(layer[rows] for layer in told[1])), ids[part])

    with torch.enable_grad():
        found = student.scored(ids, weights, head)
        found.mean().backward()
    gradients = [value.grad for value in weights.values()]
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)
    return [found.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("rows", [3, *slow(2)])
def test_losses_and_gradients_are_those_of_the_whole_model(family: str, rows: int) -> None:
    """Sums of some hundred products in float32, in another order where a batch is cut: 1e-4 of the largest."""
    program, ids = rounded(family), torch.randint(0, 90, (5, 16), generator=torch.Generator().manual_seed(1))
    start = {name: program.weights.precise(name) for name in program.trainable}
    context = Context(quiet=True)
    with targets_of(program, ids, context) as targets:
        told = targets(range(len(ids)))
    with torch.no_grad():
        torch.testing.assert_close(told, routed(program, rounded=False)(ids), rtol=1e-4, atol=1e-4)
    expected = losses_and_gradients(routed(program, rounded=True), start, ids, told)
    found = losses_and_gradients(Chain.of(program, rows), start, ids, told)
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * float(one.abs().max())


@pytest.mark.parametrize("work", [True, *slow(False)])
def test_a_pass_without_room_reports_what_one_with_room_does(tmp_path: Path, work: bool) -> None:
    ids = torch.randint(0, 12, (20, 16), generator=torch.Generator().manual_seed(0))

    def trained(limit: int | None, folder: Path | None) -> tuple[Program, Changes]:
        program = rounded("olmoe")
        context = Context(quiet=True, max_memory=limit, work=folder, load_calibration=lambda: ids)
        step = Distill(epochs=4.0, batch_size=3, checks=2, router=0.1, learning_rate=3e-3, validation_fraction=0.4)
        return program, step.run(program, context)

    (_, whole), (program, blocks) = trained(None, None), trained(1, tmp_path / "work" if work else None)
    assert isinstance(student_of(program, (3, 16), 0), Chain)
    for one, other in zip(whole.details["curve"], blocks.details["curve"], strict=True):
        assert one["validation"] == pytest.approx(other["validation"], rel=1e-3)
    for key in ("held_out_loss", "held_out_divergence"):
        for when in ("before", "after"):
            assert whole.details[key][when] == pytest.approx(blocks.details[key][when], rel=1e-3)
    assert whole.details["best_step"] == blocks.details["best_step"] > 0
    assert not work or not any((tmp_path / "work").iterdir())


def test_one_block_of_weights_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice for a step, forward and backward; blocks before the first that trains only forward."""
    program, ids = rounded("olmoe"), torch.zeros(4, 8, dtype=torch.long)
    read: list[str] = []
    parameters = Program.parameters

    def watched(self: Program, names: object) -> dict[str, Tensor]:
        found = parameters(self, names)  # type: ignore[arg-type]
        read.append(min(found, default=""))
        return found

    monkeypatch.setattr(Program, "parameters", watched)
    start = {name: program.weights.precise(name).requires_grad_() for name in program.trainable}
    student = Chain.of(program, 2)
    with torch.enable_grad():
        student.scored(ids, start, lambda outputs, part: outputs[0].square().mean((1, 2))).sum().backward()
    layers = [name.split(".")[2] if name.startswith("model.layers") else name.split(".")[-2] for name in read]
    assert layers == ["embed_tokens", "0", "1", "lm_head", "lm_head", "1", "0"]
