"""Content of files with one value made wrong, from a seed; and a count of what is refused in words."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from aqtx.errors import problems_of

VALUES = (
    *(None, True, False, -1, 0, 3, 1.5, float("nan"), float("inf"), 2**70, -(2**70), 10**12, 10**9),
    *("", "x", "auto", "NaN", "\ud800", "a" * 300, [], [3], [None], [[]], [{}], {}, {"a": 1}, {"": None}),
)


def mutated(data: Any, generator: random.Random) -> Any:
    """The data with one value, at a random depth, replaced by one of another type or size, taken out or put in."""
    if isinstance(data, dict) and data and generator.random() < 0.85:
        key, chance, changed = generator.choice(list(data)), generator.random(), dict(data)
        if chance < 0.1:
            del changed[key]
        elif chance < 0.15:
            changed[generator.choice(("unheard_of", "", "0", "\x1b[2J"))] = generator.choice(VALUES)
        else:
            changed[key] = mutated(data[key], generator)
        return changed
    if isinstance(data, list) and data and generator.random() < 0.7:
        place = generator.randrange(len(data))
        return [mutated(item, generator) if at == place else item for at, item in enumerate(data)]
    return generator.choice(VALUES)


def mutations(data: Any, count: int, seed: int = 0) -> Iterator[Any]:
    """So many of them."""
    generator = random.Random(seed)
    return (mutated(data, generator) for _ in range(count))


def damaged(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Copies of a file cut short, or with a few bytes replaced."""
    generator = random.Random(seed)
    for turn in range(count):
        data = bytearray(whole if turn % 2 else whole[: generator.randrange(len(whole))])
        for _ in range(generator.randrange(4) if data else 0):
            at = generator.randrange(len(data))
            data[at : at + 4] = generator.randbytes(4)
        yield bytes(data)


def refused(attempt: Callable[..., object], *arguments: Any) -> int:
    """1 where the attempt is refused in words, each a line; whatever else it raises fails the test."""
    told = problems_of(lambda: attempt(*arguments))
    assert [problem for problem in told if not problem.strip() or "\n" in problem] == []
    return int(bool(told))
