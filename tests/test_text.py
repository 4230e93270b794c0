"""Text sources and tokens: nothing padded, nothing twice, seeded, and errors that say how much there is."""

import gzip
import json

import pytest
import torch

from aqtx.errors import InputError
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.sources import read_passages
from aqtx.text.tokens import calibration, evaluation


class Bytes:
    """A tokenizer of 256 bytes, a start token 256 and an end token 257."""

    eos_token_id = 257

    def encode(self, text, *, add_special_tokens=True):
        return [256] * add_special_tokens + list(text.encode())


def spec(source, count, length):
    return CalibrationSpec(source=str(source), num_sequences=count, sequence_length=length)


def numbered(folder, domains, per_domain=20):
    """A JSONL file whose every token tells where it came from: 10 letters of one kind per passage."""
    path = folder / "text.jsonl"
    rows = [{"domain": name, "text": name * 10} for name in domains for _ in range(per_domain)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sequences_have_one_length_hold_no_padding_and_share_domains(tmp_path):
    ids = calibration(spec(numbered(tmp_path, "ab"), 8, 12), Bytes(), seed=0)
    assert ids.shape == (8, 12) and ids.dtype == torch.int64
    assert (ids[:, -1] == Bytes.eos_token_id).all()  # the start, 10 letters and the end token
    assert sorted(ids[:, 1].tolist()) == [ord("a")] * 4 + [ord("b")] * 4


def test_a_domain_that_runs_out_leaves_its_turns_to_the_others(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"domain": "a", "text": "a" * 10}, {"text": "b" * 65}]))
    ids = calibration(spec(path, 7, 12), Bytes())
    assert sorted(ids[:, 1].tolist()) == [ord("a")] + [ord("b")] * 6


def test_the_seed_decides_and_no_token_is_used_twice(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(chr(33 + index % 89) for index in range(1000)))
    first, again, other = (calibration(spec(path, 10, 91), Bytes(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(InputError, match=r"holds 1,001 tokens, which make 11 sequences of 91; 12 were asked for"):
        calibration(spec(path, 12, 91), Bytes())


def test_bad_numbers_are_named_together(tmp_path):
    with pytest.raises(InputError) as caught:
        calibration(spec(tmp_path, 0, 1), Bytes())
    assert len(caught.value.problems) == 2


def test_a_folder_gives_domains_by_sub_folder_and_reads_compressed_text(tmp_path):
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "one.txt").write_text("plain")
    (tmp_path / "two.md").write_text("top")
    with gzip.open(tmp_path / "prose" / "zipped.jsonl.gz", "wt") as stream:
        stream.write('{"text": "packed"}\n\n{"ids": [1, 2, 3], "domain": "self"}\n')
    passages = read_passages(str(tmp_path), "calibration")
    assert [(passage.domain, passage.text) for passage in passages] == [
        ("prose", "plain"),
        ("prose", "packed"),
        ("self", ""),
        ("text", "top"),
    ]
    assert passages[2].ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"\xff\xfe", "a.txt", "not UTF-8 text"),
        (b"{]", "a.jsonl", "line 1 is not JSON"),
        (b'{"txt": 1}', "a.jsonl", 'neither a "text" string nor an "ids" list'),
        (b"plain", "a.txt.gz", "not a whole gzip file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_passages(str(tmp_path / name), "calibration")


def test_an_unknown_source_gets_the_nearest_name(tmp_path):
    with pytest.raises(InputError, match="did you mean 'wikitext2'"):
        read_passages("wikitex2", "calibration")
    with pytest.raises(InputError, match="holds no text file"):
        read_passages(str(tmp_path), "calibration")


def test_a_folder_of_too_many_files_is_not_walked(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    monkeypatch.setattr("aqtx.text.sources._MOST_FILES", 2)
    assert len(read_passages(str(tmp_path), "calibration")) == 2
    (tmp_path / "below").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path} holds more than 2 files; name the one that has the text"):
        read_passages(str(tmp_path), "calibration")


def test_evaluation_keeps_documents_apart_and_adds_the_tokenizers_own_start_token(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"domain": "d", "text": text}) + "\n" for text in ("abc", "", "de")))
    documents = evaluation(str(path), Bytes())
    assert [document.ids.tolist() for document in documents] == [[256, 97, 98, 99], [256, 100, 101]]
    assert [document.domain for document in documents] == ["d", "d"]


def test_max_tokens_takes_domains_in_turn(tmp_path):
    documents = evaluation(str(numbered(tmp_path, "ab")), Bytes(), max_tokens=40)
    assert [document.domain for document in documents] == ["a", "b", "a", "b"]


def local_copy(folder, rows, config, split):
    """A data set in the hub's own layout: parquet files and a README that names the configuration."""
    import datasets

    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "data" / f"{split}.parquet"))
    card = f"configs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: data/{split}.parquet\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return folder


@pytest.mark.parametrize(
    ("name", "config", "rows", "expected"),
    [
        ("wikitext2", "wikitext-2-raw-v1", [{"text": "= A ="}, {"text": "b"}], ["= A =\n\nb"]),
        ("ptb", "penn_treebank", [{"sentence": "no it was"}, {"sentence": "n't"}], ["no it was n't"]),
        ("gsm8k", "main", [{"question": "1+1?", "answer": "#### 2"}], ["1+1? #### 2"]),
    ],
)
def test_named_data_sets_load_from_a_local_copy(tmp_path, monkeypatch, name, config, rows, expected):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = local_copy(tmp_path / "copy", rows, config, "train")
    assert [passage.text for passage in read_passages(f"{name}:{folder}", "calibration")] == expected


def test_c4_reads_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "copy" / "en").mkdir(parents=True)
    for shard in ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"):
        with gzip.open(tmp_path / "copy" / shard, "wt") as stream:
            stream.write(json.dumps({"text": shard, "url": "u", "timestamp": "t"}) + "\n")
    passages = read_passages(f"c4:{tmp_path / 'copy'}", "evaluation")
    assert [passage.text for passage in passages] == ["en/c4-validation.00000-of-00008.json.gz"]


def test_a_data_set_that_cannot_be_had_says_how_to_go_on(tmp_path):
    with pytest.raises(InputError, match="give a local copy as 'wikitext2:FOLDER'"):
        read_passages(f"wikitext2:{tmp_path}", "calibration")
