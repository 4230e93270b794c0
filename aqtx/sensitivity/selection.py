"""What the fields of a recipe select: sites by category or pattern, formats by name."""

from collections.abc import Iterable

from aqtx.errors import InputError
from aqtx.formats.table import parse
from aqtx.program.program import Program
from aqtx.program.roles import select
from aqtx.program.site import Site


def unique_sites(program: Program) -> dict[str, Site]:
    """Sites by name, in the model's order; a matrix that is used twice is one site."""
    return {site.name: site for site in program.sites()}


def selected_sites(program: Program, selectors: Iterable[str], where: str) -> list[Site]:
    """The sites that categories or patterns choose."""
    sites = unique_sites(program)
    chosen = select({name: site.category for name, site in sites.items()}, selectors, where)
    return [site for name, site in sites.items() if name in chosen]


def format_problems(names: Iterable[str], where: str) -> list[str]:
    """A sentence for each name that is no format."""
    problems: list[str] = []
    for name in names:
        try:
            parse(name)
        except InputError as error:
            problems.extend(f"{where}: {problem}" for problem in error.problems)
    return problems
