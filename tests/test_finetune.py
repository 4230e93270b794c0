"""Router finetuning on a small model: only routers move, through quantized experts, and held-out text decides."""

import dataclasses

import numpy as np
import pytest
import torch

from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.finetune import losses
from aqtx.finetune.frozen import Frozen
from aqtx.finetune.loop import COMPILE_PAYS_AFTER, Trainer, _batches, _warmup_then_cosine
from aqtx.finetune.measure import measure_routing
from aqtx.finetune.routed import Routed, experts_per_token, routed, router_sites
from aqtx.formats import quantize
from aqtx.passes.finetune_router import FinetuneRouter
from aqtx.passes.unfreeze_router import UnfreezeRouter
from aqtx.program.edits import QuantizeActivation
from aqtx.program.program import Program
from aqtx.registry import Changes, Context
from tests.foreign_models import foreign
from tests.tiny import OLMOE, random_model

QUICK = {"epochs": 3, "batch_size": 2, "learning_rate": 3e-4, "checks": 3}
SHRUNK = 0.4  # what is left of layer 0's last product: a systematic fault, so that a few steps of training generalise


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Weights large enough that the mixture matters."""
    made = random_model(dtype=torch.float32)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if ".mlp." in name:
                value.mul_(3)
    return made


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 12, (40, 24), generator=torch.Generator().manual_seed(0))


def rounded(model: torch.nn.Module, activation: str | None = None) -> Program:
    program = trace(model)
    experts = [site for site in program.sites() if site.expert is not None]
    for site in experts:
        site.set("format", "mxfp8")
        shrunk = SHRUNK if site.layer == 0 and site.category == "mlp_down" else 1.0
        program.codes[site.name] = quantize(program.read(site) * shrunk, "mxfp8")
    for weight in sorted({site.weight for site in experts}) if activation else []:
        program.edit(QuantizeActivation(weight=weight, formats=(activation,)))
    return program


def finetune(program: Program, ids: torch.Tensor, **fields) -> Changes:
    UnfreezeRouter().run(program, Context(quiet=True))
    return FinetuneRouter(**{**QUICK, **fields}).run(program, Context(quiet=True, load_calibration=lambda: ids))


@pytest.fixture(scope="module")
def trained(model, ids) -> tuple[Program, Changes]:
    program = rounded(model, activation="mxfp8")
    return program, finetune(program, ids)


def test_student_and_teacher_are_the_program_with_and_without_codes(model, ids):
    program = rounded(model, activation="mxfp4")
    student, teacher = routed(program, rounded=True), routed(program, rounded=False)
    with torch.no_grad():
        torch.testing.assert_close(student(ids)[0], program.module()(ids), rtol=0, atol=0)
        torch.testing.assert_close(teacher(ids)[0], trace(model).module()(ids), rtol=0, atol=0)
    logits, routers = teacher(ids)
    assert logits.shape == (*ids.shape, OLMOE["vocab_size"])
    assert [tuple(router.shape) for router in routers] == [(ids.numel(), OLMOE["num_experts"])] * 2


def test_training_lowers_the_held_out_loss_and_touches_routers_alone(model, trained):
    program, changes = trained
    untouched = rounded(model, activation="mxfp8")
    routers = {f"model.layers.{layer}.mlp.gate" for layer in range(2)}
    assert set(changes.changed) == routers
    names = program.weights.names()
    moved = {name for name in names if not torch.equal(program.weights.get(name), untouched.weights.get(name))}
    assert moved == {f"{name}.weight" for name in routers}
    codes = untouched.codes
    assert all(torch.equal(program.codes[name].qdata, codes[name].qdata) for name in codes)
    curve = {row["step"]: row["validation"] for row in changes.details["curve"]}
    assert min(curve, key=lambda step: curve[step]) == changes.details["best_step"]
    assert min(curve.values()) < 0.99 * curve[0]
    assert changes.details["tensors_unchanged"] > 10


def test_the_report_tells_shift_and_loads_of_each_layer(trained):
    details = trained[1].details
    assert [row["layer"] for row in details["layers"]] == [0, 1]
    _, second = details["layers"]
    assert 0 < second["shift_before"] < 1
    for row in details["layers"]:
        assert np.mean(row["load_after"]) == pytest.approx(1)
    assert set(details["held_out_loss"]) == {"unquantized", "before", "after", "change", "num_sequences"}


def test_what_is_measured_chose_nothing(model, ids, trained):
    """The reported losses are plain losses on sequences that neither training nor the choice of the step has seen."""
    training, choosing, places = FinetuneRouter(**QUICK)._split(len(ids))
    measuring = ids[places.start : places.stop]
    assert [*training, *choosing, *places] == list(range(len(ids))) and min(len(choosing), len(places)) >= 4
    program, changes = trained
    told = changes.details["held_out_loss"]
    assert told["num_sequences"] == len(measuring)
    for state, name in ((rounded(model, activation="mxfp8"), "before"), (program, "after")):
        with torch.no_grad():
            logits = routed(state, rounded=True)(measuring)[0]
        plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), measuring[:, 1:].flatten())
        assert told[name] == pytest.approx(float(plain), rel=1e-3)  # kept routers are stored in the model's dtype


def test_equal_seeds_give_equal_routers(model, ids, trained):
    again = rounded(model, activation="mxfp8")
    finetune(again, ids)
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"):
        assert torch.equal(again.weights.get(name), trained[0].weights.get(name))


@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0, "logits": 0.0}, {"logits": 0.0, "router": 1.0}])
def test_each_loss_trains_alone(model, ids, weights):
    curve = finetune(rounded(model), ids, **weights, epochs=6).details["curve"]
    assert min(row["validation"] for row in curve[1:]) < curve[0]["validation"]


def test_where_training_does_not_help_nothing_changes(model, ids):
    program = rounded(model)
    before = program.weights.get("model.layers.1.mlp.gate.weight").clone()
    changes = finetune(program, ids, learning_rate=1e3, warmup_fraction=0.0, patience=1, epochs=2)
    assert changes.changed == []
    assert changes.details["best_step"] == 0
    assert changes.details["stopped_early"]
    assert torch.equal(program.weights.get("model.layers.1.mlp.gate.weight"), before)


def test_a_quantized_router_and_a_shared_gate_are_refused_with_the_reason(model, ids):
    program = rounded(model)
    for site in program.sites():
        if site.category == "router" and site.layer == 0:
            site.set("format", "int8")
    changes = UnfreezeRouter().run(program, Context(quiet=True))
    assert changes.changed == ["model.layers.1.mlp.gate"]
    assert "keep `router` in `assign_plan`" in changes.refused[0].why


def test_a_changed_frozen_tensor_is_noticed(model):
    program = rounded(model)
    frozen = Frozen.of(program, except_for=["model.layers.0.mlp.gate.weight"])
    program.weights.put("model.norm.weight", program.weights.get("model.norm.weight") + 1)
    with pytest.raises(RuntimeError, match=r"training changed 1 other tensors, first model\.norm\.weight"):
        frozen.check(program)


def test_bad_fields_and_too_little_text_are_refused(model, ids):
    problems = FinetuneRouter(learning_rate=0, logits=0, validation_fraction=1.0).validate()
    assert len(problems) == 3
    with pytest.raises(InputError, match="no router is unfrozen"):
        FinetuneRouter().run(rounded(model), Context(quiet=True, load_calibration=lambda: ids))
    with pytest.raises(InputError, match="1 calibration sequences cannot be split"):
        finetune(rounded(model), ids[:1])


def test_losses_are_zero_for_equal_models_and_cross_entropy_skips_the_first_token():
    logits = torch.randn(2, 5, 7)
    assert float(losses.divergence(logits, logits).abs().max()) < 1e-6
    ids = torch.randint(0, 7, (2, 5))
    plain = torch.stack([-logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(4)])
    torch.testing.assert_close(losses.cross_entropy(logits, ids), plain.view(2, 4).mean(1))


def test_the_schedule_warms_up_decays_and_shuffles_by_seed():
    schedule = FinetuneRouter(epochs=1.5, batch_size=2, warmup_fraction=0.25)._schedule()
    batches = list(_batches(8, schedule, seed=0))
    assert len(batches) == 6
    assert sorted(int(index) for batch in batches[:4] for index in batch) == list(range(8))
    factor = _warmup_then_cosine(8, dataclasses.replace(schedule))
    assert [factor(0), factor(1)] == [0.5, 1.0]
    assert factor(8) == pytest.approx(0)


def test_loads_count_each_token_k_times(model, ids):
    routing = measure_routing(routed(rounded(model), rounded=False), ids, OLMOE["num_experts_per_tok"])
    assert all(int(layer.sum()) == ids.numel() * OLMOE["num_experts_per_tok"] for layer in routing.chosen)
    assert routing.shift_from(routing) == [0.0, 0.0]


def test_the_number_of_experts_is_read_from_the_graph(model: torch.nn.Module) -> None:
    program = trace(model)
    assert "num_experts_per_tok" not in program.config  # a module in memory has no config.json
    assert experts_per_token(program, router_sites(program)) == OLMOE["num_experts_per_tok"]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_the_number_of_experts_is_read_behind_transformers_own_routers_too(model_type: str) -> None:
    program = trace(foreign(model_type))
    assert experts_per_token(program, router_sites(program)) == 2


def test_a_router_without_a_top_k_is_named(model: torch.nn.Module) -> None:
    program = trace(model)
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.topk.default:
            node.target = torch.ops.aten.sort.default
    with pytest.raises(InputError, match=r"cannot be read from the graph behind model\.layers\.0\.mlp\.gate"):
        experts_per_token(program, router_sites(program))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_tokens_decide_whether_training_is_compiled(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock would make reruns differ in the last bits."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    schedule = FinetuneRouter()._schedule()
    trainer = Trainer(Routed(None, None, None), None, None, None, schedule)  # type: ignore[arg-type]
    trainer._maybe_compile(int(share * COMPILE_PAYS_AFTER))
    assert trainer.compiled is bool(compiled) is (share == 1.0)
