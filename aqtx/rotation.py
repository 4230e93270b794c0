"""What the rotating passes share: weights that may be changed, tied embeddings, fusing along the stream."""

from collections.abc import Iterable

from aqtx.errors import InputError
from aqtx.program import Program, weight_node
from aqtx.rowwise import aten


def check_plain(program: Program, weights: Iterable[str]) -> None:
    """Refuse to change weights that are rounded already.

    Raises:
        InputError: names the first of them.
    """
    wanted = set(weights)
    for site in program.sites():
        if site.weight in wanted and (site.name in program.codes or hasattr(program.stored(site), "format_name")):
            raise InputError(f"{site.name} is quantized already: rotate and fold before `quantize` or `gptq`")


def embedding_weights(program: Program) -> set[str]:
    """The parameters that embeddings gather from."""
    gathers = (node for node in program.graph.nodes if node.target is aten.embedding.default)
    return {str(node.args[0].target) for node in gathers}


def untie_all(program: Program) -> dict[str, str]:
    """Give each linear that shares an embedding's weights its own copy; {shared: copy}."""
    shared = embedding_weights(program)
    linears = {str(found.target) for node in program.graph.nodes if (found := weight_node(node)) is not None}
    copies = {weight: "lm_head.weight" for weight in sorted(shared & linears)}
    for weight, copy in copies.items():
        program.edit({"edit": "untie", "weight": weight, "copy": copy})
    return copies
