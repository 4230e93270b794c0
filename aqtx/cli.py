"""The command line: picks a command, and turns what goes wrong into one sentence and an exit status.

0 is success, 2 bad input (every problem on a line of its own), 1 any other failure.
"""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

import aqtx
from aqtx.commands import Command, apply, check, compare, eval, export, generate, ls, package, plan, report, study
from aqtx.errors import InputError, Notice, nearest, printable
from aqtx.machine.one_dnn import keep_few_kernels
from aqtx.machine.signals import Stopped, ending_signals

COMMANDS: tuple[Command, ...] = (
    apply.COMMAND,
    plan.COMMAND,
    study.COMMAND,
    check.COMMAND,
    eval.COMMAND,
    report.COMMAND,
    compare.COMMAND,
    export.COMMAND,
    package.COMMAND,
    generate.COMMAND,
    ls.COMMAND,
)

_GOES_ON = {
    "apply": "; the same command with --resume goes on from the last finished pass",
    "study": "; the same command goes on with what is scored already",
}
_SOURCES = tuple(Path(__file__).parent.joinpath(name).resolve() for name in (".", "passes", "models"))


class _Parser(argparse.ArgumentParser):
    """argparse with errors in this program's form."""

    def error(self, message: str) -> NoReturn:
        """One sentence and where to read on, instead of the usage lines."""
        raise InputError(f"{message}; see `{self.prog} --help`")


class _Escaping:
    """Standard output that shows names from files as they are, and lets none of them command the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what is printable of a text as it is, the rest escaped."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words or bool(os.environ.get("AQTX_DEBUG"))

    def only_debugging(record: logging.LogRecord) -> bool:
        return show_traceback

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes are for its users; read when it is imported
    keep_few_kernels()
    try:
        arguments = parse_arguments(words)
        # torchao registers its enums in a way that torch 2.13 logs a deprecation for; it is none of a user's business.
        # Filters, since torch sets its loggers' levels anew when it is imported; what a trace fails of is told by us.
        with (
            warnings.catch_warnings(),
            filtered("torch.utils._pytree", _is_no_enum_notice),
            filtered("torch._subclasses.fake_tensor", only_debugging),
        ):
            warnings.showwarning = _show_warning
            with ending_signals(), redirect_stdout(cast(TextIO, _Escaping(sys.stdout))):
                status: int = arguments.run(arguments)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except InputError as error:
        return _fail(2, error.problems, show_traceback)
    except KeyboardInterrupt as error:
        hint = _GOES_ON.get(next(iter(words), ""), "")
        return _fail(1, [f"{error if isinstance(error, Stopped) else 'interrupted'}{hint}"], show_traceback)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `aqtx ls formats | head` is no failure
        return 0
    except Exception as error:  # noqa: BLE001 the last line of defence: a user gets a sentence, not a stack
        reason = " ".join(str(error).split()) or "no message"
        return _fail(1, [f"{type(error).__name__}: {reason}; AQTX_DEBUG=1 shows where"], show_traceback)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The chosen command's arguments; overrides may stand between and after options."""
    parser = build_parser()
    _check_command(words)
    arguments, rest = parser.parse_known_args(words)
    options = [word for word in rest if word.startswith("-")]
    if options:
        parser.error(f"{arguments.command}: unknown option {options[0]}")
    if rest and not hasattr(arguments, "overrides"):
        parser.error(f"{arguments.command}: unexpected argument {rest[0]!r}")
    if rest:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="aqtx",
        description="Mixed-precision quantization of mixture-of-experts language models.",
        epilog="example:\n  aqtx apply quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aqtx {aqtx.__version__}")
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = chosen.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"example:\n  {command.example}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--traceback", action="store_true", help="show the full traceback of a failure")
        sub.set_defaults(run=command.run)
    return parser


def _check_command(words: Sequence[str]) -> None:
    """Name the nearest command; argparse would list them all."""
    names = [command.name for command in COMMANDS]
    first = next(iter(words), "")
    if first and not first.startswith("-") and first not in names:
        raise InputError(
            f"unknown command {first!r}{nearest(first, names) or '; the commands are ' + ', '.join(names)}"
        )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """This package's warnings as sentences; what libraries warn about is for their users, and shown when debugging."""
    if any(Path(filename).resolve().is_relative_to(folder) for folder in _SOURCES):
        kind = "" if issubclass(category, Notice) else "warning: "
        print(printable(f"aqtx: {kind}{message}"), file=sys.stderr)
    elif os.environ.get("AQTX_DEBUG"):
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr, end="")


@contextmanager
def filtered(logger: str, let_through: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """A logger says only what is let through, for a while."""
    found = logging.getLogger(logger)
    found.addFilter(let_through)
    try:
        yield
    finally:
        found.removeFilter(let_through)


def _is_no_enum_notice(record: logging.LogRecord) -> bool:
    return "Enum subclass" not in record.getMessage()


def _fail(status: int, reasons: Sequence[str], show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    for reason in reasons:
        print(printable(f"aqtx: error: {reason}"), file=sys.stderr)
    return status
