"""transformers' conversions of weights (`transformers.conversion_mapping`) as index arithmetic over stored tensors.

transformers describes how the tensors of a file become a model's parameters as data: names are rewritten, and chains
of operations merge, join, cut and turn tensors. It runs them on whole tensors; here each operation makes pieces, so
that nothing is read until a weight is asked for. An operation that has no piece here is refused by its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aqtx.checkpoint.pieces import Joined, Piece, Stacked
from aqtx.errors import InputError
from aqtx.program.names import Shape

Values = dict[str, list[Piece]]  # by pattern of names


@dataclass(frozen=True)
class Target:
    """What a chain of operations makes: its rule, the first parameter's name, and what the model expects."""

    rule: Any  # transformers' WeightConverter
    name: str
    shapes: Mapping[str, Shape]
    config: Any

    def named(self, values: Values) -> dict[str, Piece]:
        """Full names of parameters, from patterns: the first one is known, the others are spelled around theirs."""
        full = self.name.replace("*.", "0.")
        key = next((key for key in values if key in full), None)
        prefix, _, suffix = full.partition(key) if key is not None else ("", "", "")
        return {f"{prefix}{pattern}{suffix}": pieces[0] for pattern, pieces in values.items()}


def convert(target: Target, collected: Mapping[str, Sequence[Piece]]) -> dict[str, Piece]:
    """Parameters by full name, from the stored tensors that each source pattern of the rule has found.

    Raises:
        InputError: an operation is none that is known here, or the tensors do not fit it.
    """
    values: Values = {pattern: list(pieces) for pattern, pieces in collected.items()}
    for operation in target.rule.operations:
        name = type(operation).__name__
        step = _STEPS.get(name)
        if step is None or getattr(operation, "inverse", False):
            raise InputError(f"{target.name} is made by transformers' {name}, which aqtx cannot do piece by piece")
        try:
            values = step(operation, values, target)
        except (ValueError, StopIteration) as error:
            raise InputError(f"{target.name} cannot be put together by {name}: {error}") from None
    return target.named(values)


def _only(values: Values) -> tuple[str, Piece]:
    [(pattern, pieces)] = values.items()
    return pattern, pieces[0]


def _merge(operation: Any, values: Values, target: Target) -> Values:
    """One tensor an expert -> a stack."""
    alone = len(values) == 1
    return {
        target.rule.target_patterns[0] if alone else pattern: [Stacked(tuple(pieces), operation.dim)]
        for pattern, pieces in values.items()
    }


def _unmerge(operation: Any, values: Values, target: Target) -> Values:
    """A stack -> one tensor an expert."""
    alone, made = len(values) == 1, {}
    for pattern, (piece, *_) in values.items():
        name = target.rule.target_patterns[0] if alone else pattern
        for at in range(piece.shape[operation.dim]):
            made[name.replace("*", str(at))] = [piece.select(operation.dim, at)]
    return made


def _join(operation: Any, values: Values, target: Target) -> Values:
    """Gate and up -> one tensor, in the order of the rule's patterns."""
    members = [piece for pattern in target.rule.source_patterns for piece in values.get(pattern, [])]
    return {target.rule.target_patterns[0]: [Joined(tuple(members), operation.dim)]}


def _chunk(operation: Any, values: Values, target: Target) -> Values:
    """One tensor -> equal parts, one a target."""
    names, (_, piece) = list(target.rule.target_patterns), _only(values)
    if operation.num_shards_attribute is not None:
        count = int(getattr(target.config.get_text_config(), operation.num_shards_attribute))
        names = [names[0].replace("*", str(at)) for at in range(count)]
    return {name: [part] for name, part in zip(names, piece.chunk(len(names), operation.dim), strict=True)}


def _split(operation: Any, values: Values, target: Target) -> Values:
    """One tensor -> parts as large as the parameters that they become."""
    names, (_, piece) = target.rule.target_patterns, _only(values)
    sizes = [target.shapes[target.name.replace(names[0], name)][operation.dim] for name in names]
    if sum(sizes) != piece.shape[operation.dim]:
        raise ValueError(f"{piece.shape[operation.dim]} rows are not {' + '.join(map(str, sizes))}")
    return {name: [part] for name, part in zip(names, piece.split(sizes, operation.dim), strict=True)}


def _transpose(operation: Any, values: Values, target: Target) -> Values:
    """Two dimensions exchanged; with `check_dims` only where the shape asks for it."""
    pattern, piece = _only(values)
    names = target.rule.target_patterns
    as_it_is = operation.check_dims and piece.shape == target.shapes[target.name]
    turned = piece if as_it_is else piece.transpose(operation.dim0, operation.dim1)
    return {names[0] if len(names) == 1 else pattern: [turned]}


def _part_pairs(operation: Any, values: Values, target: Target) -> Values:
    """Neighbours that alternate -> all first ones, then all second ones."""
    _, piece = _only(values)
    whole = range(piece.shape[operation.dim])
    halves = (piece.take(operation.dim, whole[::2]), piece.take(operation.dim, whole[1::2]))
    return {target.rule.target_patterns[0]: [Joined(halves, operation.dim)]}


_STEPS: dict[str, Callable[[Any, Values, Target], Values]] = {
    "MergeModulelist": _merge,
    "SplitModulelist": _unmerge,
    "Concatenate": _join,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Interleave": _part_pairs,
}
