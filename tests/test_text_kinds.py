"""Text in other files, ids that a model does not know, contexts under other names, numbers beyond float16."""

import gzip
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import aqtx
from aqtx.blockwise.block_scores import BlockScorer
from aqtx.errors import InputError
from aqtx.evaluate.perplexity import evaluate_perplexity, window_of
from aqtx.passes.annotate_fisher import AnnotateFisher
from aqtx.passes.annotate_hessian import AnnotateHessian
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.gptq import Gptq
from aqtx.program.generate import Generator
from aqtx.program.token_ids import check_ids, num_positions, num_tokens
from aqtx.registry import Context
from aqtx.runs.opening import calibration_of, documents_of
from aqtx.runs.recipe import parse_recipe
from aqtx.text.sources import Passage, read_passages
from aqtx.text.tokens import Document
from tests.marks import slow
from tests.tiny import OLMOE, hub_tensors, random_model, write_checkpoint

ROWS = [{"text": "one", "domain": "a"}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FOUND = [Passage("a", "one"), Passage("text", "two")]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.JSONL", "x.json", "x.json.gz", "x.JSONL.GZ", "x.ndjson.gz"])
def test_rows_are_rows_whatever_the_file_is_called(tmp_path, name):
    data = LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert read_passages(str(tmp_path / name), "calibration") == FOUND
    assert read_passages(str(tmp_path), "calibration") == FOUND


@pytest.mark.parametrize("text", [json.dumps(ROWS, indent=1), json.dumps([ROWS[0], "two"])])
def test_a_list_of_rows_or_texts(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert read_passages(str(tmp_path / "x.json"), "calibration") == FOUND


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.csv", "a,b", r"\.csv is not read as text; write a line"),
        ("x.CSV.gz", "a,b", r"\.csv is not read as text"),
        ("x.parquet", "PAR1", r"\.parquet is not read"),
        ("x.json", '{\n "text": "a"\n}', r"x\.json, line 1 is not JSON"),
        ("x.json", "[3]", r"x\.json, entry 1 has neither"),
        ("x.json", "[" * 5000, r"x\.json is not JSON"),
    ],
)
def test_what_is_no_text_is_told_by_its_kind(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        read_passages(str(tmp_path / name), "calibration")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return aqtx.trace(write_checkpoint(tmp_path_factory.mktemp("source")))


@pytest.mark.parametrize("wrong", [192, 10**6])
def test_tokens_beyond_the_embedding_are_told(program, tmp_path, wrong):
    assert (num_tokens(program), num_positions(program)) == (192, None)
    ids = torch.tensor([[1, wrong]])
    for work in (
        lambda: BlockScorer(program, 10**9)(ids),
        lambda: Generator(program).continue_prompts([[1, wrong]], max_new_tokens=1),
        lambda: check_ids(program, [torch.tensor([0, -1])], "text"),
    ):
        with pytest.raises(InputError, match="embedding has the tokens 0 to 191"):
            work()
    (tmp_path / "x.jsonl").write_text(json.dumps({"ids": [wrong] * 300}))
    recipe = {"version": 1, "model": {"source": str(program.folder)}, "calibration": {"source": f"{tmp_path}/x.jsonl"}}
    recipe["calibration"] |= {"num_sequences": 2, "sequence_length": 32}
    folder = program.folder
    (folder / "tokenizer.json").write_bytes((aqtx.trace("tinymoe").folder / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=f"calibration text: sequence 0 holds the token {wrong}"):
        calibration_of(parse_recipe(recipe), program, Context())
    with pytest.raises(InputError, match=f"evaluation text .* holds the token {wrong}"):
        documents_of(program, f"{tmp_path}/x.jsonl")


@pytest.mark.parametrize("kind", ["gptj", *slow("codegen", "gpt_bigcode", "opt")])
def test_a_context_under_another_name_is_kept(tmp_path, kind):
    small = {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 24, "rotary_dim": 8}
    small |= {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 24}
    small |= {"ffn_dim": 64, "word_embed_proj_dim": 64}
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{key: value for key, value in small.items() if hasattr(known, key)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    program = aqtx.trace(tmp_path)
    assert window_of(program.config) == num_positions(program) == 24
    assert BlockScorer(program, 10**9)(torch.zeros(1, 24, dtype=torch.long)).shape[1] == 24
    with pytest.raises(InputError, match="25 tokens, but the model has 24 positions"):
        BlockScorer(program, 10**9)(torch.zeros(1, 25, dtype=torch.long))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model of three layers whose second one's `down_proj` of experts puts out more than float16 holds."""
    config = OLMOE | {"num_hidden_layers": 3}
    tensors = hub_tensors(random_model(config))
    large = {name: 3e4 * value for name, value in tensors.items() if "layers.1.mlp.experts" in name and "down" in name}
    large |= {name: 100 * value for name, value in tensors.items() if "layers.1.mlp.experts" in name and "up" in name}
    return aqtx.trace(write_checkpoint(tmp_path_factory.mktemp("large"), config, **large), torch.float16)


def test_an_overflow_in_float16_names_the_layer_and_the_remedy(overflowing):
    ids = torch.arange(64).view(2, 32)
    words = r"activations of model\.layers\.1\.mlp\.experts\.down_proj overflow in float16.*model\.dtype: bfloat16"
    for work in (
        lambda: evaluate_perplexity(BlockScorer(overflowing, 10**9), [Document("a", ids[0])], window=16),
        lambda: aqtx.run(overflowing, [AnnotateHessian()], calibration=ids),
        lambda: aqtx.run(overflowing, [AnnotateFisher(num_sequences=2)], calibration=ids),
        lambda: aqtx.run(
            overflowing, [AssignPlan(method="uniform", candidates=("int4_g32",)), Gptq()], calibration=ids
        ),
    ):
        with pytest.raises(InputError, match=words):
            work()


def test_predictions_that_are_not_finite_are_told_in_any_dtype():
    with pytest.raises(InputError, match="evaluation document 0 are not finite"):
        evaluate_perplexity(
            lambda ids: torch.full((*ids.shape, 8), float("nan")), [Document("a", torch.arange(5))], window=8
        )


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.0.mlp.gate.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named_by_evaluation(tmp_path, key):
    value = hub_tensors(random_model())[key].clone()
    value.view(-1)[3] = float("nan")
    program = aqtx.trace(write_checkpoint(tmp_path / "source", **{key: value}))
    with pytest.raises(InputError, match=f"document 0 are not finite.*: {key} holds NaN or infinity"):
        evaluate_perplexity(BlockScorer(program, 10**9), [Document("a", torch.arange(12))], window=16)
