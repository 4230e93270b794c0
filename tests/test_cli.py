"""The command line: help, speed, errors and exit statuses."""

import dataclasses
import resource
import shlex
import subprocess
import sys

import pytest

from aqtx import cli
from aqtx.errors import InputError


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command run in this process."""
    try:
        status = cli.main(words)
    except SystemExit as stop:  # argparse's own end after --help
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys; from aqtx.cli import build_parser; build_parser().format_help();"
        "print([name for name in ('torch', 'numpy', 'transformers', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "aqtx", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: the machine may be busy, and this start waits for nothing else.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_help_ends_with_an_example_that_parses(command, capsys):
    status, out, _ = run(capsys, command.name, "--help")
    assert status == 0
    last = out.rstrip().splitlines()[-1].strip()
    assert last == command.example
    assert last.startswith(f"aqtx {command.name} ")
    arguments = cli.parse_arguments(shlex.split(last)[1:])
    assert arguments.command == command.name


def test_options_and_overrides_may_be_mixed():
    arguments = cli.parse_arguments(["apply", "quickstart", "seed=1", "--overwrite", "report=false"])
    assert arguments.overwrite is True
    assert arguments.overrides == ["seed=1", "report=false"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "the following arguments are required: COMMAND; see `aqtx --help`"),
        (("aply", "quickstart"), "unknown command 'aply', did you mean 'apply'?"),
        (("apply",), "the following arguments are required: RECIPE"),
        (("apply", "quickstart", "--overwrit"), "apply: unknown option --overwrit"),
        (
            ("apply", "quickstart", "--resume", "--overwrite"),
            "argument --overwrite: not allowed with argument --resume",
        ),
        (
            ("apply", "quickstat"),
            "there is no recipe file 'quickstat' and no shipped recipe of that name, did you mean",
        ),
        (("check", "quickstart", "seed"), "'seed' is not an override; write key.path=value, for example seed=1"),
        (("check", "quickstart", "sed=1"), "sed: unknown key, did you mean 'seed'?"),
        (("ls", "everything"), "argument what: invalid choice: 'everything'"),
        (("ls", "passes", "now"), "ls: unexpected argument 'now'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, reason, capsys):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith(f"aqtx: error: {reason}")


def test_each_problem_has_a_line_of_its_own(capsys):
    status, _, err = run(capsys, "check", "quickstart", "sed=1", "model.sorce=x", "report=3")
    assert status == 2
    assert err.splitlines() == [
        "aqtx: error: sed: unknown key, did you mean 'seed'?",
        "aqtx: error: model.sorce: unknown key, did you mean 'source'?",
        "aqtx: error: report: expected true or false, got 3",
    ]


def failing(error: BaseException):
    def fail(arguments):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (InputError("one", "two"), 2, ["aqtx: error: one", "aqtx: error: two"]),
        (RuntimeError("broken\npipe"), 1, ["aqtx: error: RuntimeError: broken pipe; AQTX_DEBUG=1 shows where"]),
        (KeyboardInterrupt(), 1, ["aqtx: error: interrupted"]),
        (FileNotFoundError(2, "No such file", "x"), 1, ["aqtx: error: FileNotFoundError: [Errno 2] No such file: 'x'"]),
    ],
)
def test_failures_are_one_sentence_without_a_traceback(error, status, reason, capsys, monkeypatch):
    monkeypatch.delenv("AQTX_DEBUG", raising=False)
    monkeypatch.setattr(cli, "COMMANDS", (dataclasses.replace(cli.ls.COMMAND, run=failing(error)),))
    found, out, err = run(capsys, "ls", "passes")
    assert (found, out) == (status, "")
    assert [line.startswith(start) for line, start in zip(err.splitlines(), reason, strict=True)] == [True] * len(
        reason
    )


def test_a_traceback_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", (dataclasses.replace(cli.ls.COMMAND, run=failing(RuntimeError("oh"))),))
    for words in (["ls", "passes", "--traceback"],):
        _, _, err = run(capsys, *words)
        assert "Traceback (most recent call last)" in err
    monkeypatch.setenv("AQTX_DEBUG", "1")
    _, _, err = run(capsys, "ls", "passes")
    assert "Traceback (most recent call last)" in err


def test_check_prints_the_order_of_the_passes(capsys):
    status, out, _ = run(capsys, "check", "quickstart")
    assert status == 0
    first, *table = out.splitlines()
    assert first == "quickstart: all right. tinymoe: annotate_alpha -> assign_plan -> gptq -> emit"
    assert table[0].startswith("stage") and len(table) == 2 + 6  # four passes, evaluation before and after


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("passes", ["emit", "gptq", "damp_fraction: float = 0.01", "annotate_alpha"]),
        ("formats", ["mxfp4", "4.25", "nvfp4", "int4_g64_asym"]),
        ("models", ["shipped: tinymoe", "olmoe"]),
        ("recipes", ["quickstart", "aqtx apply quickstart"]),
    ],
)
def test_ls_lists(what, expected, capsys):
    status, out, err = run(capsys, "ls", what)
    assert (status, err) == (0, "")
    assert [word for word in expected if word not in out] == []


def test_a_closed_pipe_is_no_failure():
    command = f"{sys.executable} -m aqtx ls passes | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "aqtx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("aqtx ")
