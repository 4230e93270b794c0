"""What commands beside `apply` write: nobody else's file goes, one process at a time, torn records are made again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aqtx import cli
from aqtx.checkpoint.exports.run import export
from aqtx.errors import InputError
from aqtx.machine.command_output import kept_folder, made_file, made_folder
from aqtx.machine.lock import OutputLock
from aqtx.machine.marker import MARKER, claim, mark
from aqtx.report.compare import write_comparison
from aqtx.report.write import write_report
from tests.tiny import write_checkpoint

CHANGE = {"value": 0.1, "low": 0.0, "high": 0.2}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing() -> None:
    """What happens meanwhile."""


def made(output: Path, content: str = "new", command: str = "eval", meanwhile=nothing, **flags: bool) -> None:
    with made_folder(output, command, ["a/*.txt"], **flags) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b.txt").write_text(content)
        meanwhile()


def made_single(output: Path, meanwhile=nothing) -> None:
    with made_file(output, "export") as staged:
        staged.write_text("ours")
        meanwhile()


def stop() -> None:
    raise RuntimeError("stop")


def test_a_folder_is_replaced_only_by_the_command_that_made_it(tmp_path):
    output = tmp_path / "out"
    made(output)
    made(output, "newer")
    assert (output / "a" / "b.txt").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(InputError, match="not empty"):
        made(output, replace=False)
    with pytest.raises(InputError, match=r"`aqtx compare` did not write \(a/b\.txt\)"):
        made(output, command="compare")
    mark(output, "run", ["a/b.txt"])
    with pytest.raises(InputError, match="did not write"):
        made(output)


@pytest.mark.parametrize("name", ["thesis.txt", "a/mine.txt", "a/b.txt"])
@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("replaces", [False, True])
def test_what_others_put_into_a_folder_stays(tmp_path, name, when, replaces):
    output = tmp_path / "out"
    if replaces:
        made(output)

    def put() -> None:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")

    if replaces and name == "a/b.txt":
        return  # a file of ours that somebody edited is still ours
    if when == "before":
        put()
        before = tree(tmp_path)
        with pytest.raises(InputError, match=r"no run wrote|did not write"):
            made(output)
        assert tree(tmp_path) == before
        return
    with pytest.raises(InputError, match=r"waits in .*out\.partial"):
        made(output, "hours of work", meanwhile=put)
    assert (output / name).read_text() == "mine"
    assert (tmp_path / "out.partial" / "a" / "b.txt").read_text() == "hours of work"


def test_a_failure_leaves_nothing_and_a_kill_what_the_next_call_clears(tmp_path):
    output = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError):
        made(output, meanwhile=stop)
    assert list(tmp_path.iterdir()) == []
    child = os.fork()
    if not child:
        made(output, meanwhile=lambda: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(child, 0)
    made(output)
    assert sorted(tree(output)) == [MARKER, "a/b.txt"]


def test_a_partial_folder_or_file_of_the_users_own_is_not_removed(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    for name in ("out.partial", "model.gguf.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    (tmp_path / "file.gguf.partial").write_text("mine")
    before = tree(tmp_path)
    for to, output in (("dequantized", "out"), ("gguf", "model.gguf"), ("gguf", "file.gguf")):
        with pytest.raises(InputError, match="is where this run would work"):
            export(source, to, tmp_path / output)
    assert tree(tmp_path) == before


def test_a_file_is_never_replaced_not_even_one_that_came_meanwhile(tmp_path):
    output = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="waits in"):
        made_single(output, lambda: output.write_text("mine"))
    assert output.read_text() == "mine"
    with pytest.raises(InputError, match="exists"):
        made_single(output)
    output.unlink()
    made_single(output)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_one_process_at_a_time(tmp_path):
    lock = OutputLock(tmp_path / "out")
    try:
        for work in (
            lambda: made(tmp_path / "out"),
            lambda: made_single(tmp_path / "out"),
            lambda: kept_folder(tmp_path / "out", []).__enter__(),
            lambda: write_report(tmp_path / "out"),
            lambda: export(tmp_path, "dequantized", tmp_path / "out"),
        ):
            with pytest.raises(InputError, match=f"process {os.getpid()} on .* is working on output"):
                work()
    finally:
        lock.release()


def run_folder(folder: Path, name: str) -> Path:
    entry = {"before": CHANGE, "after": CHANGE, "change": CHANGE}
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"name": name, "perplexity": entry, "bytes": {"after": 3}}))
    return folder


def test_reports_and_comparisons_replace_their_own_pages_only(tmp_path):
    runs = [run_folder(tmp_path / name, name) for name in ("a", "b")]
    (runs[0] / "report.html").write_text("mine")
    with pytest.raises(InputError, match=r"report\.html, which would be replaced, and aqtx did not write it"):
        write_report(runs[0])
    assert (runs[0] / "report.html").read_text() == "mine"
    write_report(runs[1])
    write_report(runs[1])
    output = tmp_path / "compare"
    (output / "figures").mkdir(parents=True)
    (output / "figures" / "mine.png").write_bytes(b"mine")
    (output / "compare.html").write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        write_comparison(runs, output)
    shutil.rmtree(output)
    page = write_comparison(runs, output)
    assert write_comparison(runs, output).read_bytes() == page.read_bytes()
    (output / "figures" / "mine.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="no run wrote"):
        write_comparison(runs, output)
    assert (output / "figures" / "mine.png").read_bytes() == b"mine"


def test_what_is_in_the_way_of_a_plan_or_an_evaluation_is_told_first(tmp_path, capsys):
    (tmp_path / "run.plan").mkdir()
    (tmp_path / "run.plan" / "alpha.csv").write_text("mine")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "eval.json").write_text("mine")
    before = tree(tmp_path)
    for words in (
        ["plan", "quickstart", "model.source=nowhere", f"output={tmp_path / 'run'}"],
        ["eval", "nowhere", "--to", str(tmp_path / "to")],
    ):
        assert cli.main(words) == 2
        assert "did not write" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["''", ".", "/", "x/..", "..", "x" * 300])
@pytest.mark.parametrize("command", ["plan", "study", "apply"])
def test_outputs_that_are_no_folder_of_their_own(tmp_path, monkeypatch, capsys, output, command):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "quickstart", f"output={output}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "output" in line
    assert list(tmp_path.iterdir()) == []


STUDY = ["study", "quickstart", "study={average_bits: [5.0], methods: [uniform], trial_seconds: 0.1}"]
STUDY += ["evaluate.max_tokens=300", "calibration.num_sequences=4", "calibration.sequence_length=32"]


@pytest.mark.slow
def test_a_study_scores_again_what_was_torn_and_goes_on_with_the_rest(tmp_path, capsys):
    words = [*STUDY, f"output={tmp_path / 'run'}"]
    assert cli.main(words) == 0, capsys.readouterr().err
    folder = tmp_path / "run.study"
    first = json.loads((folder / "study.json").read_text())
    scores = sorted((folder / "scores").iterdir())
    times = {file: file.stat().st_mtime_ns for file in scores}
    scores[0].write_bytes(scores[0].read_bytes()[:-20])
    scores[1].write_text(scores[1].read_text().replace("1", "2"))
    assert cli.main(words) == 0
    again = json.loads((folder / "study.json").read_text())
    for told in (first, again):
        told["seconds"] = told["quick"]["seconds"] = 0
    assert again == first
    assert [file for file in scores if file.stat().st_mtime_ns == times[file]] == scores[2:]


STOPPED = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from aqtx import cli
from aqtx.passes.annotate_alpha import AnnotateAlpha
AnnotateAlpha.run = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_study_that_is_asked_to_end_says_how_it_goes_on(tmp_path):
    words = [sys.executable, "-c", STOPPED, *STUDY, f"output={tmp_path / 'run'}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "stopped by SIGTERM; the same command goes on with what is scored already" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_claim_beside_others_files(tmp_path):
    with kept_folder(tmp_path / "out", ["x"]) as folder:
        assert not folder.exists()
        claim(folder, "plan", ["x"])
    assert (tmp_path / "out" / MARKER).exists()
