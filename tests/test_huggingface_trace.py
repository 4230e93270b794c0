"""Models that aqtx does not implement: transformers' own modules, traced, quantized, written and read back."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import aqtx
from aqtx.blockwise.block_scores import BlockScorer
from aqtx.checkpoint.open import open_program
from aqtx.cli import main
from aqtx.errors import InputError
from aqtx.formats import quantize
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.gptq import Gptq
from aqtx.program.token_ids import check_length
from tests.foreign_models import FOREIGN, foreign
from tests.marks import slow
from tests.model_cases import oracle, token_ids


def difference(program: aqtx.Program, model: nn.Module) -> float:
    """The largest difference of logits over batches and lengths, of which some are 1."""
    module, found = program.module(), 0.0
    with torch.no_grad():
        for batch, length in ((2, 19), (1, 1), (3, 4)):
            ids = token_ids(batch, length)
            found = max(found, (module(ids) - model(input_ids=ids).logits).abs().max().item())
    return found


SLOW = [pytest.param(model_type, marks=pytest.mark.slow) for model_type in ("gemma", "granitemoe")]


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", *slow("phi", "gpt_neox", "qwen3_moe"), *SLOW])
def test_modules_in_memory_trace_to_canonical_graphs(model_type: str) -> None:
    theirs = foreign(model_type)
    program = aqtx.trace(theirs)
    _, matrices, norms = FOREIGN[model_type]
    sites = Counter(site.layer for site in program.sites())
    counts = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert (sites[0], sites[1], sites[None]) == (matrices, matrices, 1)
    assert counts["aten.rms_norm.default"] == norms
    assert difference(program, theirs) <= 2e-6


@pytest.mark.parametrize("model_type", ["gpt_oss", *slow("qwen3_moe", "deepseek_v3"), *SLOW])
def test_folders_are_quantized_written_and_read_back(model_type: str, tmp_path: Path) -> None:
    """gemma and qwen3_moe are read by name; of the others only transformers can translate the names."""
    theirs = foreign(model_type)
    theirs.save_pretrained(tmp_path / "source")
    program = aqtx.trace(tmp_path / "source")
    assert difference(program, theirs) <= 2e-6
    for site in program.sites():
        if site.layer is not None and site.category != "router":
            program.codes[site.name] = quantize(program.read(site), "int4_g32" if site.shape[0] % 3 else "mxfp6")
    program.emitted = True
    aqtx.save(program, tmp_path / "quantized")
    loaded, ids = aqtx.load(tmp_path / "quantized"), token_ids(2, 11)
    with torch.no_grad():
        before, after = program.module()(ids), loaded.module()(ids)
    assert torch.equal(before, after)
    assert difference(loaded, theirs) > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("name", ["mixtral", *slow("llama-tied")])
def test_modules_of_our_own_families_take_our_names(name: str, tmp_path: Path) -> None:
    theirs = oracle(name)
    program = aqtx.trace(theirs)
    assert difference(program, theirs) <= 2e-6
    aqtx.save(program, tmp_path / "saved")
    assert difference(aqtx.load(tmp_path / "saved"), theirs) <= 2e-6


def test_a_routers_correction_bias_is_read_in_its_own_precision(tmp_path: Path) -> None:
    theirs = foreign("deepseek_v3").to(torch.bfloat16)
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data = torch.linspace(-1, 1, 8)  # float32, as published
    theirs.save_pretrained(tmp_path)
    program = aqtx.trace(tmp_path)
    read = program.weights.get("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(read, bias)
    assert program.dtype == torch.bfloat16


def test_a_model_out_of_reach_is_an_error_that_names_what_is_missed() -> None:
    with pytest.raises(InputError, match=r"GPT2LMHeadModel: only 6% .*transformer\.h\.0\.mlp\.c_fc"):
        aqtx.trace(foreign("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64))


def test_missing_tensors_are_an_error_not_random_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    foreign("gemma").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        aqtx.trace(tmp_path)


def test_a_config_alone_is_enough_for_a_plan(tmp_path: Path) -> None:
    foreign("gemma", num_hidden_layers=1).save_pretrained(tmp_path)
    whole = aqtx.trace(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    alone = open_program(tmp_path, None, config_only=True)
    assert [site.name for site in alone.sites()] == [site.name for site in whole.sites()]
    assert alone.weights.specs == whole.weights.specs and alone.weights.tied == whole.weights.tied
    with pytest.raises(InputError, match=r"only config\.json was opened"):
        alone.weights.get("model.layers.0.mlp.up_proj.weight")


def test_a_type_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    foreign("gemma").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"gemma"', '"gemmma"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="'gemmma' is known neither to aqtx nor to transformers"):
        aqtx.trace(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt_neox", *slow("gemma3_text", "granitemoe")])
def test_gptq_walks_the_blocks_of_a_foreign_model(model_type):
    """transformers' graphs carry the device of the trace in positional arguments, ours do not."""
    plan = AssignPlan(method="uniform", candidates=("int4",))
    program = aqtx.run(aqtx.trace(foreign(model_type)), [plan, Gptq()], calibration=token_ids(4, 32))
    planned = [site.name for site in program.sites() if site.get("format") == "int4"]
    assert planned
    assert [name for name in planned if name not in program.codes] == []


def test_buffers_that_checkpoints_hold_come_in_the_models_dtype(tmp_path: Path) -> None:
    """MiniMax stores its decays, which transformers loads in bf16 and multiplies with activations in bf16."""
    settings = {"num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 32, "head_dim": 16}
    settings |= {"layer_types": ["linear_attention", "full_attention"]}
    foreign("minimax", **settings).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    program, ids = aqtx.trace(tmp_path), token_ids(2, 19)
    held = {name: value for name, value in theirs.named_buffers() if name.endswith(("decay", "slope_rate"))}
    assert len(held) == 4
    for name, value in held.items():
        assert torch.equal(program.weights.get(name), value)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits.float()
    # Both round to 8 bits behind every op, in orders of their own.
    assert (program.module()(ids).float() - expected).abs().median() <= 2**-8 * expected.abs().max()


def test_a_text_longer_than_a_graph_holds_for_is_refused(tmp_path: Path) -> None:
    """MiniMax loops over pieces of a text; the trace follows the one piece of its example."""
    settings = {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 16}
    settings |= {"layer_types": ["linear_attention", "full_attention"]}
    program = aqtx.trace(foreign("minimax", block_size=32, **settings))
    score = BlockScorer(program, 1 << 40)
    assert score(token_ids(1, 32)).shape == (1, 32, 96)
    with pytest.raises(InputError, match=r"the window is 33 tokens, but .* pieces of 32"):
        score(token_ids(1, 33))
    check_length(aqtx.trace(oracle("llama")), 1 << 20, "any text")


def test_a_model_that_cannot_be_exported_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch logs the stack of an op that fails on meta, which a user gets only for debugging."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.bmm(self.weight[None].float(), self.weight[None].to(torch.bfloat16)) + ids.sum()

    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", told.append)
    foreign("phi").config.save_pretrained(tmp_path)
    monkeypatch.setattr("aqtx.checkpoint.huggingface.open.skeleton", lambda config: Mixed())
    words = [f"model.source={tmp_path}", f"output={tmp_path / 'out'}", "--config-only"]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        assert main(["plan", "quickstart", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "cannot be exported by torch.export" in line
        assert not told
        assert main(["plan", "quickstart", *words, "--traceback"]) == 2
        assert told
    finally:
        logger.removeHandler(handler)
