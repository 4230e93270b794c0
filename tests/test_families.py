"""Every own family through the whole of aqtx: traced, quantized, saved, reloaded, generated with a cache, exported."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import aqtx
from aqtx.blockwise.block_writer import BlockWriter
from aqtx.checkpoint.exports.run import export
from aqtx.errors import InputError
from aqtx.models import MODEL_TYPES, UNROTATED
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.fold_norms import FoldNorms
from aqtx.passes.fuse_hadamard import FuseHadamard
from aqtx.passes.gptq import Gptq
from aqtx.passes.insert_hadamard import InsertHadamard
from aqtx.passes.quantize import Quantize
from aqtx.program.accounting import account
from aqtx.program.generate import Generator, Sampling, Writes
from aqtx.registry import Pass
from aqtx.runs.pipeline import run
from tests.marks import slow, slow_but
from tests.model_cases import CASES, oracle, token_ids

# One case a family, with what sets it apart.
FAMILIES = (
    "olmoe",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "qwen3-next",
    "qwen3-5-moe",
    "gpt-oss",
    "granitemoe",
    "ernie-moe",
    "deepseek-v2",
    "deepseek-v3",
    "glm4-moe",
    "gemma3",
    "llama",
    "qwen3",
)


# What stands for the others in the default suite, where the shipped model is everywhere: latent and linear attention.
PARAMS = slow_but(("deepseek-v3", "qwen3-5-moe"), FAMILIES)


@pytest.fixture(scope="module", params=PARAMS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint that transformers saved."""
    folder = tmp_path_factory.mktemp(request.param, numbered=False)
    oracle(request.param).to(torch.bfloat16).save_pretrained(folder)
    return folder


def rounded(source: Path, dtype: torch.dtype | None, *steps: Pass) -> aqtx.Program:
    plan = AssignPlan(method="uniform", candidates=("int4_g32", "mxfp8"), average_bits=6.0, keep=("router", "lm_head"))
    return run(aqtx.trace(source, dtype), [plan, *steps, Emit()])


def test_a_family_is_read_as_transformers_reads_it(source: Path) -> None:
    """bf16 weights computed in float32: both see the same values."""
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    ids = token_ids(2, 11)
    with torch.no_grad():
        expected = theirs(ids).logits
    found = aqtx.trace(source, torch.float32).module()(ids)
    assert (found - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))


def test_rounded_saved_and_reloaded_bit_for_bit(source: Path, tmp_path: Path) -> None:
    program, ids = rounded(source, None, Quantize()), token_ids(2, 9)
    expected = program.module()(ids)
    assert program.codes
    assert not [site for site in program.codes if site.endswith((".gate", ".router", ".router.layer", "lm_head"))]
    aqtx.save(program, tmp_path / "saved")
    assert torch.equal(aqtx.load(tmp_path / "saved").module()(ids), expected)


def test_what_is_no_matrix_is_kept_and_counted(source: Path) -> None:
    """Correction biases, sinks, convolutions and decays are never rounded; quantized and kept add up to the file."""
    program = rounded(source, None, Quantize())
    special = ("correction_bias", "moe_statics", "sinks", "conv1d", "A_log", "dt_bias")
    assert not [name for name in program.codes if any(part in name for part in special)]
    with safe_open(source / "model.safetensors", framework="pt") as file:
        stored = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118  (no mapping)
    counted = account(program, ()).elements
    assert counted["total"] == stored == counted["quantized"] + counted["kept"]
    assert counted["quantized"] == sum(site.numel for site in program.sites() if site.name in program.codes)


def test_generated_with_a_cache_as_by_scoring_again(source: Path) -> None:
    program = rounded(source, torch.float32, Quantize())
    prompts = [token_ids(1, 5)[0].tolist(), token_ids(1, 8, seed=1)[0].tolist()]
    score = program.module()
    for prompt, made in zip(prompts, Generator(program).continue_greedily(prompts, max_new_tokens=4), strict=True):
        for count, token in enumerate(made):
            logits = score(torch.tensor([prompt + made[:count]]))[0, -1]
            assert logits[token] >= logits.max() - 1e-5


def test_written_one_block_at_a_time_as_in_memory(source: Path, tmp_path: Path) -> None:
    """The same operations in the same order: the same tokens, with every kind of cache, on disk and in memory."""
    program = aqtx.trace(source, torch.float32)
    firsts = [token_ids(3, 2), token_ids(2, 2, seed=1)]

    def written(writes: Writes) -> list[torch.Tensor]:
        randoms = [torch.Generator().manual_seed(index) for index in range(2)]
        return writes.write_each(firsts, 9, Sampling(temperature=1.0), randoms)

    whole = Generator(program)
    expected, shares = written(whole), whole.mean_next(firsts[0])
    for room in (0, 1 << 20):
        blocks = BlockWriter(program, room, tmp_path, lambda items, **_: items)
        assert all(torch.equal(one, other) for one, other in zip(expected, written(blocks), strict=True))
        assert torch.equal(shares, blocks.mean_next(firsts[0]))
    assert not any(tmp_path.iterdir())


def test_gptq_walks_every_family(source: Path) -> None:
    text = token_ids(8, 32)
    program = run(
        aqtx.trace(source, torch.float32),
        [
            AssignPlan(method="uniform", candidates=("int4_g32", "int8"), average_bits=6.0, keep=("router", "lm_head")),
            Gptq(),
        ],
        calibration=text,
    )
    planned = [site.name for site in program.sites() if site.get("format") is not None]
    assert planned
    assert set(program.codes) == set(planned)


def test_exported_for_transformers(source: Path, tmp_path: Path) -> None:
    aqtx.save(rounded(source, None, Quantize()), tmp_path / "saved")
    export(tmp_path / "saved", "dequantized", tmp_path / "plain", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager")
    ids = token_ids(2, 7)
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
    found = aqtx.trace(tmp_path / "plain", torch.float32).module()(ids)
    assert (found - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["gpt-oss", *slow("granitemoe")])
def test_experts_that_no_program_loads_one_by_one_are_refused(name: str, tmp_path: Path) -> None:
    oracle(name).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    aqtx.save(rounded(tmp_path / "source", None, Quantize()), tmp_path / "saved")
    with pytest.raises(InputError, match="in one tensor a layer, for which compressed-tensors has no form"):
        export(tmp_path / "saved", "compressed-tensors", tmp_path / "out")


ROTATIONS: dict[str, list[Pass]] = {
    "residual": [FoldNorms(), InsertHadamard(before=("residual",), block=16), FuseHadamard()],
    "down": [InsertHadamard(before=("mlp_down",), block=8)],
    "heads": [InsertHadamard(before=("attn_o",), block="head"), FuseHadamard()],
}


REFUSED = {"residual": "rms_norm.* takes part in what is added to the residual stream"}


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_are_exact_or_refused_by_a_sentence(source: Path, rotation: str) -> None:
    """Beside the pipeline's own probe in float64: float32 logits move by rounding alone."""
    program, ids = aqtx.trace(source, torch.float32), token_ids(2, 9)
    expected = program.module()(ids)
    if rotation in UNROTATED.get(CASES[source.name][0], ()):
        with pytest.raises(InputError, match=REFUSED[rotation]):
            run(program, ROTATIONS[rotation])
        return
    run(program, ROTATIONS[rotation])
    assert program.edits
    found = program.module()(ids)
    assert (found - expected).abs().max() <= 4e-6 * max(1.0, float(expected.abs().max()))


def test_correction_biases_keep_their_precision(tmp_path: Path) -> None:
    """They are published in float32 beside bf16 weights; a rounded one would choose other experts."""
    theirs = oracle("deepseek-v3").to(torch.bfloat16)
    precise = 1 + torch.arange(8) * 2.0**-20
    theirs.model.layers[1].mlp.gate.e_score_correction_bias = torch.nn.Buffer(precise)
    theirs.save_pretrained(tmp_path / "model")
    program = rounded(tmp_path / "model", None, Quantize())
    aqtx.save(program, tmp_path / "saved")
    for folder in ("model", "saved"):
        found = aqtx.load(tmp_path / folder).weights.get("model.layers.1.mlp.gate.e_score_correction_bias")
        assert torch.equal(found, precise)


def test_layers_that_predict_several_tokens_are_left_out_with_a_word(tmp_path: Path) -> None:
    theirs = oracle("glm4-moe")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"model.layers.3.{name}": torch.zeros(4) for name in ("eh_proj.weight", "enorm.weight")}
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"2 tensors are left out, first model\.layers\.3\.eh_proj\.weight"):
        program = aqtx.trace(tmp_path, torch.float32)
    assert not [name for name in program.weights.names() if ".layers.3." in name]


ELSEWHERE = {"deepseek"}  # transformers has no class: test_models_deepseek.py
SAME_CLASS = {"mistral", "qwen2", "smollm3"}  # Llama's, by settings


def test_every_family_is_tested() -> None:
    assert {CASES[name][0] for name in FAMILIES} == MODEL_TYPES.keys() - ELSEWHERE - SAME_CLASS
