"""The output folder: complete or absent, never half, and nothing that existed is lost by accident."""

import json
from pathlib import Path

import pytest
import torch

from aqtx.errors import InputError
from aqtx.machine.files import sha256
from aqtx.runs.directory import CHECKSUMS, RunDirectory
from aqtx.runs.fingerprint import first_difference, ids_hash, text_hashes


def finished(output, text="new"):
    run = RunDirectory(output, overwrite=True)
    run.begin({"recipe": 1})
    (run.staging / "report.json").write_text(text)
    run.finish()
    return run


def test_files_appear_only_when_the_run_is_complete(tmp_path):
    output = tmp_path / "run"
    run = RunDirectory(output)
    run.begin({"recipe": 1})
    (run.staging / "report.json").write_text("{}")
    assert not output.exists()
    run.finish()
    assert (output / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_checksums_name_every_file(tmp_path):
    output = tmp_path / "run"
    finished(output)
    named = ("fingerprint.json", "report.json")
    assert json.loads((output / CHECKSUMS).read_text()) == {name: sha256(output / name) for name in named}


def test_an_output_that_holds_files_is_refused_and_left_alone(tmp_path):
    output = tmp_path / "run"
    finished(output)
    with pytest.raises(InputError, match="holds files already; pass --overwrite"):
        RunDirectory(output)
    assert (output / "report.json").read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_wrote_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="replaces runs only" if overwrite else "holds files already"):
        RunDirectory(tmp_path, overwrite=overwrite)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_overwrite_keeps_the_old_run_until_the_new_one_is_complete(tmp_path):
    output = tmp_path / "run"
    finished(output, "old")
    run = RunDirectory(output, overwrite=True)
    run.begin({"recipe": 2})
    assert (output / "report.json").read_text() == "old"
    (run.staging / "report.json").write_text("new")
    run.finish()
    assert (output / "report.json").read_text() == "new"


def test_a_swap_that_fails_leaves_the_old_run(tmp_path, monkeypatch):
    finished(tmp_path / "run", "old")
    run = RunDirectory(tmp_path / "run", overwrite=True)
    run.begin({"recipe": 2})
    rename = Path.rename

    def fail(self, target):
        if self == run.staging:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        run.finish()
    assert (tmp_path / "run" / "report.json").read_text() == "old"
    run.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.partial"]


def test_a_folder_in_the_place_of_the_unfinished_run_is_left_alone(tmp_path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "mine").touch()
    with pytest.raises(InputError, match="no run wrote it"):
        RunDirectory(tmp_path / "run", overwrite=True)


def test_an_unfinished_run_asks_for_resume_or_overwrite(tmp_path):
    RunDirectory(tmp_path / "run").begin({"recipe": 1})
    with pytest.raises(InputError, match="pass --resume or --overwrite"):
        RunDirectory(tmp_path / "run")


def test_resume_names_the_first_difference(tmp_path):
    RunDirectory(tmp_path / "run").begin({"recipe": {"seed": 0, "passes": [{"gptq": {"damp_fraction": 0.01}}]}})
    run = RunDirectory(tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"recipe\.passes\.0\.gptq\.damp_fraction was 0\.01 and is now 0\.02"):
        run.begin({"recipe": {"seed": 0, "passes": [{"gptq": {"damp_fraction": 0.02}}]}})


def test_first_difference_of_equal_things_is_none():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == "b was None and is now 2"


def test_resume_never_replaces_files_that_no_run_wrote(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="holds files already"):
        RunDirectory(output, resume=True)


def test_resume_goes_on_with_what_was_to_replace_a_finished_run(tmp_path):
    output = tmp_path / "run"
    finished(output)
    assert RunDirectory(output, resume=True).complete
    RunDirectory(output, overwrite=True).begin({"recipe": 2})  # and is killed here
    assert not RunDirectory(output, resume=True).complete


def test_the_fingerprint_sees_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = text_hashes(str(tmp_path))
    (tmp_path / "a.txt").write_text("two")
    assert "a.txt" in (first_difference(before, text_hashes(str(tmp_path))) or "")
    assert text_hashes(str(tmp_path / "a.txt")) != {}
    assert text_hashes("builtin") == {}
    assert ids_hash([torch.tensor([1, 2])]) != ids_hash([torch.tensor([1]), torch.tensor([2])])
