"""What the rotating passes share: which weights may be changed, which inputs are rotated, which sites are meant."""

from collections.abc import Iterable

from torch import fx

from aqtx.errors import InputError
from aqtx.program.edits import Hadamard
from aqtx.program.inserted_ops import inserted_ops
from aqtx.program.program import Program
from aqtx.program.roles import select
from aqtx.program.site import Site
from aqtx.rotation.residual_stream import residual_stream
from aqtx.rotation.row_ops import Unproven, is_hadamard


def check_plain(program: Program, weights: Iterable[str]) -> None:
    """Refuse to change weights that are rounded already.

    Raises:
        InputError: names the first of them.
    """
    wanted = set(weights)
    loaded = program.config.get("quantization_config", {}).get("formats", {})
    for site in program.sites():
        if site.weight in wanted and (site.name in program.codes or site.name in loaded):
            raise InputError(f"{site.name} is quantized already: rotate and fold before `quantize` or `gptq`")


def input_rotation(node: fx.Node) -> fx.Node | None:
    """The rotation on a linear's input, before the quantization of activations, if there is one."""
    return next((inserted for inserted in inserted_ops(node) if is_hadamard(inserted)), None)


def select_sites(program: Program, selectors: Iterable[str]) -> list[Site]:
    """Sites by category, group or pattern, and by `residual` (readers of the stream) and `plan` (as planned).

    Raises:
        InputError: a pattern matches nothing, or the residual stream cannot be followed.
    """
    selectors = list(selectors)
    sites = {site.name: site for site in program.sites()}
    chosen = select_named(program, selectors)
    if "residual" in selectors:
        try:
            readers = set(residual_stream(program.graph).readers)
        except Unproven as reason:
            raise InputError(f"before: `residual` is refused: {reason}") from None
        chosen |= {site.name for site in sites.values() if site.node in readers}
    if "plan" in selectors:
        planned = {site.weight for site in sites.values() if site.get("rotation") is not None}
        chosen |= {site.name for site in sites.values() if site.weight in planned}  # a stack has one input
    return [site for name, site in sites.items() if name in chosen]


def select_named(program: Program, selectors: Iterable[str]) -> set[str]:
    """Names of the sites that categories, groups and patterns select, as they stand in any state of the program."""
    words = [word for word in selectors if word not in ("residual", "plan")]
    return set(select({site.name: site.category for site in program.sites()}, words, "before"))


def check_planned(program: Program) -> None:
    """Refuse to round while a rotation that the plan counts on has not been carried out.

    Raises:
        InputError: names the first site.
    """
    done = {edit.weight for edit in program.edits if isinstance(edit, Hadamard)}
    missing = [site.name for site in program.sites() if site.get("rotation") is not None and site.weight not in done]
    if missing:
        raise InputError(
            f"the plan rotates the inputs of {len(missing)} sites, first {missing[0]}: "
            "add `- insert_hadamard: {before: [plan]}` after `assign_plan`"
        )
