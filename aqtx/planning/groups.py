"""Sites that must share one format, because a run time fuses their matrices into one."""

import re
from collections.abc import Iterable, Sequence

from aqtx.errors import InputError, nearest
from aqtx.program.roles import matcher

# Sites whose captures agree form a group.
_NAMED: dict[str, tuple[str, ...]] = {
    "qkv": (r"(.*)\.[qkv]_proj$",),
    "gate_up": (r"(.*)\.(?:gate_proj|up_proj|w1|w3)$",),
    "experts": (r"(.*)\.experts\.\d+\.",),
}
_NAMED["vllm"] = tuple(pattern for patterns in _NAMED.values() for pattern in patterns)


def group_problems(groups: Iterable[str]) -> list[str]:
    """What is wrong with the names of groups, in sentences."""
    problems = []
    for group in groups:
        if group.startswith("re:"):
            try:
                if not matcher(group).groups:
                    problems.append(f"groups: {group!r} captures nothing; put what the sites share into parentheses.")
            except InputError as error:
                problems.extend(f"groups: {problem}" for problem in error.problems)
        elif group not in _NAMED:
            problems.append(f"groups: {group!r} is none of {', '.join(_NAMED)} nor `re:...`{nearest(group, _NAMED)}.")
    return problems


def group_numbers(names: Sequence[str], groups: Iterable[str], fused: Sequence[str] = ()) -> list[int]:
    """A number per site, equal for sites of one group. Groups that overlap become one.

    A named group may be empty in a model, and so may an expression of `fused`; a pattern must match.
    """
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    optional = {**_NAMED, **{expression: (expression,) for expression in fused}}
    for group in [*groups, *fused]:
        patterns = [re.compile(pattern) for pattern in optional[group]] if group in optional else [matcher(group)]
        for pattern in patterns:
            first: dict[tuple[str | None, ...], int] = {}
            for i, name in enumerate(names):
                if match := pattern.search(name):
                    parent[root(i)] = root(first.setdefault(match.groups(), i))
            if group not in optional and not first:
                raise InputError(f"groups: {group!r} matches no planned site")
    return [root(i) for i in range(len(names))]
