"""Bad input, told in sentences: one exception that carries every problem found."""

import difflib
from collections.abc import Callable, Iterable


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


def nearest(word: str, choices: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
