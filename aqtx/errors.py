"""Bad input, told in sentences: one exception that carries every problem found."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used. Each problem is one sentence that names its place."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def printable(text: str) -> str:
    """The text with everything that a terminal would obey, or could not show, written out: `\\x1b[2J`."""
    return "".join(letter if _is_shown(letter) else _escape(letter) for letter in text)


def _is_shown(letter: str) -> bool:
    """Printed characters, line ends and tabs, and the spaces of other scripts."""
    return letter.isprintable() or letter in "\n\t" or (letter.isspace() and letter > "\x9f")


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


class Notice(UserWarning):
    """Something that was found and is right, told once where it is found: the command line prints it as it is."""


def problems_of(attempt: Callable[[], object]) -> list[str]:
    """What an attempt has to say against its input; nothing where it succeeds."""
    try:
        attempt()
    except InputError as error:
        return error.problems
    return []


@contextmanager
def malformed(what: str) -> Iterator[None]:
    """Whatever a reader of foreign content stumbles over becomes one sentence on `what`; the cause stays attached.

    For readers that trust their input, ours or a library's: what they raise on content that they were not made for is
    of any type. `what` begins the sentence: "config.json: no model can be made of it".
    """
    try:
        yield
    except InputError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line and without its type."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, KeyError):
        return f"{str(error)[:80]} is missing or unknown"
    words = " ".join(str(error).split())
    if isinstance(error, (AttributeError, TypeError)):
        return printable(f"a value in it is of another kind than is read there ({words[:300]})")
    return printable(words[:300]) or f"{type(error).__name__} without a reason"


def nearest(word: str, choices: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
