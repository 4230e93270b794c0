"""Nobody's data is lost to a run: what others put beside its files stays, two runs never share an output."""

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from aqtx.errors import InputError
from aqtx.machine.files import read_record, write_record
from aqtx.machine.marker import MARKER, claim
from aqtx.runs.directory import CHECKSUMS, RunDirectory


def begun(output: Path, **flags: bool) -> RunDirectory:
    """A run that has written a report into its staging folder, a resume point and a figure."""
    run = RunDirectory(output, **flags)
    run.begin({"recipe": 1})
    (run.staging / "report.json").write_text("new")
    (run.work / "codes").mkdir(exist_ok=True)
    (run.work / "codes" / "site.safetensors").write_text("codes")
    return run


def finish(output: Path, **flags: bool) -> None:
    begun(output, **flags).finish()


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_written_into_the_output_during_the_run_stays(tmp_path, overwrite):
    output = tmp_path / "run"
    run = begun(output, overwrite=overwrite)
    output.mkdir()
    (output / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match=r"thesis\.txt|no finished run of ours") as caught:
        run.finish()
    run.release()
    assert "--resume finishes it" in caught.value.problems[-1]
    assert (output / "thesis.txt").read_text() == "years"
    (output / "thesis.txt").rename(tmp_path / "elsewhere.txt")
    again = begun(output, resume=True)
    again.finish()
    assert (output / "report.json").read_text() == "new"


@pytest.mark.parametrize("place", ["notes.txt", "figures/mine.png", "work/notes.txt", "model.safetensors"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_overwrite_removes_no_file_that_stands_beside_those_of_a_finished_run(tmp_path, place, when):
    output = tmp_path / "run"
    finish(output)

    def put() -> None:
        (output / place).parent.mkdir(exist_ok=True)
        (output / place).write_text("mine")

    if when == "before":
        put()
        with pytest.raises(InputError, match="no run wrote"):
            begun(output, overwrite=True)
    else:
        run = begun(output, overwrite=True)
        put()
        with pytest.raises(InputError, match="no run wrote"):
            run.finish()
    assert (output / place).read_text() == "mine"
    assert (output / "report.json").exists()


@pytest.mark.parametrize("place", ["notes.txt", "figures/mine.png", "work/notes.txt", "work/codes/notes.md"])
def test_overwrite_removes_no_file_that_stands_in_an_unfinished_run(tmp_path, place):
    run = begun(tmp_path / "run")
    run.release()
    (run.staging / place).parent.mkdir(exist_ok=True)
    (run.staging / place).write_text("mine")
    with pytest.raises(InputError, match="no run wrote"):
        begun(tmp_path / "run", overwrite=True)
    assert (run.staging / place).read_text() == "mine"
    begun(tmp_path / "run", resume=True).finish()  # going on takes it along
    assert (tmp_path / "run" / place).read_text() == "mine"
    with pytest.raises(InputError, match="no run wrote"):
        RunDirectory(tmp_path / "run", overwrite=True)


@pytest.mark.parametrize("names", [("config.json", "model.safetensors"), ("work/x.json",), (CHECKSUMS,), ("a/b",)])
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_a_partial_folder_without_our_mark_is_nobodys_to_remove(tmp_path, names, flags):
    for name in names:
        (tmp_path / "run.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run.partial" / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="no run wrote it"):
        RunDirectory(tmp_path / "run", **flags)
    assert tree(tmp_path) == before


def test_a_link_in_the_place_of_the_partial_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="it is no folder"):
        RunDirectory(tmp_path / "run", overwrite=True)


def test_a_refused_overwrite_leaves_the_unfinished_run_it_was_to_replace(tmp_path):
    run = begun(tmp_path / "run")
    run.release()
    before = tree(run.staging)
    RunDirectory(tmp_path / "run", overwrite=True).release()  # whose recipe is refused before it begins
    assert tree(run.staging) == before


def test_a_refused_run_leaves_no_folder_behind(tmp_path):
    RunDirectory(tmp_path / "a" / "b" / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_of_an_unfinished_run_that_is_given_up_nothing_stays(tmp_path):
    begun(tmp_path / "run").release()
    run = RunDirectory(tmp_path / "run", overwrite=True)
    run.begin({"recipe": 2})
    assert not (run.work / "codes").exists()
    assert not (run.staging / "report.json").exists()


def forked(work, *arguments: object) -> int:
    """The process id of a copy of this process that runs `work` and then ends without tidying up."""
    child = os.fork()
    if not child:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return child


def test_a_second_run_into_one_output_is_refused_by_process_and_the_lock_goes_with_a_kill(tmp_path):
    output, held = tmp_path / "run", tmp_path / "held"

    def hold() -> None:
        run = begun(output)
        held.touch()
        time.sleep(60)
        run.release()

    other = forked(hold)
    while not held.exists():
        time.sleep(0.01)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match=rf"process {other} on .* is working on output {output}"):
            RunDirectory(output, **flags)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    RunDirectory(output, resume=True).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "run.partial"]


def replace_and_die(output: Path, name: str, count: int) -> None:
    """Replace a finished run; the process is killed at the call number `count` of one of the system's functions."""
    function, left = getattr(os, name), [count]

    def stop(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(os, name, stop)
    finish(output, overwrite=True)


CALLS = [("unlink", at) for at in range(9)] + [("rmdir", 0), ("rmdir", 2), ("rename", 0), ("rename", 1), ("replace", 3)]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_kill_at_any_moment_of_the_end_leaves_a_run_that_resumes(tmp_path, call):
    output = tmp_path / "run"
    finish(output)
    _, status = os.waitpid(forked(replace_and_die, output, *call), 0)
    assert status in (signal.SIGKILL, 0)
    left = list(tmp_path.glob("run.replaced-*"))
    with pytest.warns(UserWarning, match="remove it when it is not needed") if left else nullcontext():
        run = RunDirectory(output, resume=True)
    if run.complete:
        run.clean()
        run.release()
    else:
        run.begin({"recipe": 1})
        (run.staging / "report.json").write_text("new")
        run.finish()
    assert (output / "report.json").read_text() == "new"
    assert sorted(path.name for path in output.iterdir()) == [MARKER, CHECKSUMS, "fingerprint.json", "report.json"]


@pytest.mark.parametrize("place", range(0, 150, 7))
def test_a_record_with_any_byte_changed_is_named(tmp_path, place):
    file = tmp_path / "record.json"
    write_record(file, {"codes": {"site": ["a", "int3"]}, "value": 1.5})
    assert read_record(file) == {"codes": {"site": ["a", "int3"]}, "value": 1.5}
    text = bytearray(file.read_bytes())
    at = place % len(text)
    text[at] ^= 4
    file.write_bytes(bytes(text))
    with pytest.raises(InputError, match=r"record\.json: resume data is missing or damaged"):
        read_record(file)
    file.write_bytes(bytes(text[:at]))
    with pytest.raises(InputError, match=r"record\.json: resume data is missing or damaged"):
        read_record(file)


@pytest.mark.parametrize("output", ["", ".", "/", "x/..", "..", "a\0b", "x" * 300])
def test_an_output_that_can_be_no_folder_of_its_own_is_refused(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="output"):
        RunDirectory(Path(output))
    assert list(tmp_path.iterdir()) == []


def test_a_command_replaces_its_own_files_and_no_others(tmp_path):
    claim(tmp_path, "plan", ["plan.json"])
    (tmp_path / "plan.json").write_text("ours")
    claim(tmp_path, "plan", ["plan.json", "alpha.csv"])
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.md, which would be replaced"):
        claim(tmp_path, "plan", ["plan.json", "notes.md"])


def test_two_locks_cannot_be_had_in_one_process_either(tmp_path):
    run = begun(tmp_path / "run")
    with pytest.raises(InputError, match=f"process {os.getpid()} on"):
        RunDirectory(tmp_path / "run", resume=True)
    run.release()
    RunDirectory(tmp_path / "run", resume=True).release()
