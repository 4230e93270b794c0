"""Which token ids a model knows, and how many in a row: told before a table is read beyond its end."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.program.program import Program
from aqtx.program.trace import LONGEST

# Names of the context length in config.json; those of the second row count positions that the model holds itself.
_CONTEXT = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
_COUNTED = ("n_positions", "n_ctx")
_EMBEDDING = torch.ops.aten.embedding.default


def context_of(config: Mapping[str, Any]) -> int | None:
    """The context length in tokens that config.json tells under any of its names, or None."""
    told = [config.get(name) for name in (*_COUNTED, *_CONTEXT)]
    return next((size for size in told if type(size) is int and size > 0), None)


def num_tokens(program: Program) -> int | None:
    """Rows of the table that token ids are looked up in; None where there is no such table."""
    rows = [_rows(program, node) for node in _tables(program) if _reads_ids(node)]
    return min((size for size in rows if size is not None), default=None)


def num_positions(program: Program) -> int | None:
    """How many positions the model holds in a table or counts; None where they are computed without an end."""
    if any(not _reads_ids(node) for node in _tables(program)) or any(name in program.config for name in _COUNTED):
        return context_of(program.config)
    return None


def check_ids(program: Program, sequences: Iterable[Tensor], what: str) -> None:
    """InputError where `what` holds ids that the model has no embedding for."""
    refuse_ids(num_tokens(program), sequences, what)


def refuse_ids(rows: int | None, sequences: Iterable[Tensor], what: str) -> None:
    """InputError where `what` holds ids beyond an embedding of so many rows; None knows all."""
    if rows is None:
        return
    for number, ids in enumerate(sequences):
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise InputError(
                f"{what}: sequence {number} holds the token {wrong}, but the model's embedding has the tokens 0 to "
                f"{rows - 1}; is the tokenizer the model's own?"
            )


def check_length(program: Program, length: int, what: str) -> None:
    """InputError where so many tokens in a row are more than the model has positions, or its graph holds for."""
    refuse_length(num_positions(program), length, what)
    most = program.entries["score"].meta.get(LONGEST)
    if most is not None and length > most:
        raise InputError(
            f"{what} is {length} tokens, but the model goes through texts in pieces of {most}, and its graph holds for "
            f"one piece; take {most} or fewer"
        )


def refuse_length(most: int | None, length: int, what: str) -> None:
    """InputError where so many tokens in a row are more than so many positions; None has no end."""
    if most is not None and length > most:
        raise InputError(f"{what} is {length} tokens, but the model has {most} positions; take {most} or fewer")


def _tables(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is _EMBEDDING]


def _reads_ids(node: fx.Node) -> bool:
    """Whether a look-up's indices are the model's input in whatever shape, and not positions counted up."""
    source = node.args[1]
    while isinstance(source, fx.Node) and source.op != "placeholder":
        counted = any(word in str(source.target) for word in ("arange", "sym_size", "cumsum"))
        if counted or len(source.all_input_nodes) != 1:
            return False
        source = source.all_input_nodes[0]
    return isinstance(source, fx.Node)


def _rows(program: Program, node: fx.Node) -> int | None:
    table = node.args[0]
    spec = program.weights.specs.get(str(table.target)) if isinstance(table, fx.Node) else None
    return None if spec is None else spec.shape[0]
