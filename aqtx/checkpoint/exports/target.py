"""What a form of export is, and what a program that loads it asks for.

A `Target` is one way of writing a checkpoint; a `Client` is a program that runs it, with constraints of its own. Both
are rows (`table.py`): exporting refuses by them what cannot be loaded, and planning reads them before it decides.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aqtx.checkpoint.exports.compare import Checked
from aqtx.formats import QuantizedTensor
from aqtx.formats.table import Format
from aqtx.program.edits import Edit, QuantizeActivation, by_weight, in_force
from aqtx.program.program import Program
from aqtx.program.site import Site

FormOf = Callable[[Format, int], str | None]  # format, columns of the matrix -> name of its form


class Matrix(NamedTuple):
    """A matrix whose format is in question: its site, the length of its rows, the model's config.json."""

    site: str
    columns: int
    config: Mapping[str, Any]


def _nothing(fmt: Format, matrix: Matrix) -> str | None:
    return None


def _no_inputs(site: str, activation: str) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Client:
    """A program that runs what a target writes.

    Fields:
        name: as `target` of `assign_plan` names it.
        target: what it loads.
        alike: patterns; sites with equal captures must share one format, or all stay unquantized.
        why: the reason of each pattern, in its order.
        refuses: (format, matrix) -> a sentence where this program cannot run what the target can hold.
        refuses_inputs: (site, activation) -> a sentence where it cannot run what the target holds for rounded inputs.
        coded: pattern of sites that must all be quantized, if anything is.
        shared_scale: patterns; matrices in the NVFP4 format with equal captures need one outer scale.
    """

    name: str
    target: str
    alike: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    refuses: Callable[[Format, Matrix], str | None] = _nothing
    refuses_inputs: Callable[[str, str], str | None] = _no_inputs
    coded: str | None = None
    shared_scale: tuple[str, ...] = ()

    def unlike(self, formats: Mapping[str, str | None]) -> list[str]:
        """Sentences for the groups of sites whose formats should be one; None stands for an unquantized site."""
        problems = []
        for pattern, why in zip(self.alike, self.why, strict=True):
            for members in captured(pattern, formats).values():
                found = sorted({formats[site] or "unquantized" for site in members})
                if len(found) > 1:
                    problems.append(f"{self.name}: {why}, but {members[0]} and its group have {', '.join(found)}")
        plain = [site for site, fmt in formats.items() if fmt is None and self.coded and re.search(self.coded, site)]
        if plain and any(formats.values()) and not problems:
            problems.append(f"{self.name} loads no unquantized experts beside quantized matrices, as {plain[0]} is")
        return problems


def captured(pattern: str, sites: Iterable[str]) -> dict[tuple[str | None, ...], list[str]]:
    """Sites by what the pattern captures of their names."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for site in sites:
        if found := re.search(pattern, site):
            groups.setdefault(found.groups(), []).append(site)
    return groups


@dataclass(frozen=True)
class Job:
    """One export. `output` is where to write: a temporary name, renamed when all is done."""

    program: Program
    output: Path
    formats: dict[str, Format]  # of the quantized sites; bf16, which is no code, is not among them
    name: str = "model"
    template: Path | None = None
    dtype: torch.dtype = torch.bfloat16

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Sites by name; a matrix that is used twice is one site."""
        return {site.name: site for site in self.program.sites()}

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype in which a tensor lies in the checkpoint while it is not quantized."""
        site = self.sites.get(key.removesuffix(".weight"))
        return self.program.weights.specs[key if site is None else site.weight].on_disk

    def activations(self) -> dict[str, str]:
        """Site -> the format into which its input is rounded as the model runs."""
        found: dict[str, str] = {}
        sites = self.program.sites_by_weight()
        for weight, edits in by_weight(self.program.edits).items():
            for edit in in_force(edits):
                if isinstance(edit, QuantizeActivation):
                    named = zip(sites.get(weight, []), _repeated(edit.formats, len(sites.get(weight, []))), strict=True)
                    found.update({site.name: fmt for site, fmt in named if fmt})
        return found

    def plain(self, *, skip_codes: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(key on disk, tensor) of what stays unquantized, one in memory at a time; rotations before it are undone."""
        program, sites, tied = self.program, self.program.sites_by_weight(), self.program.tied()
        edits = by_weight(program.edits)
        for name in program.weights.names():
            if name in tied:
                continue
            if name not in sites:
                yield name, program.weights.on_disk(name)
            for site in {site.name: site for site in sites.get(name, [])}.values():
                if site.name not in self.formats or not skip_codes:
                    yield f"{site.name}.weight", plain_matrix(program, site, in_force(edits.get(name, [])))


def _repeated(formats: tuple[str, ...], count: int) -> tuple[str, ...]:
    return formats * count if len(formats) == 1 else formats


def plain_matrix(program: Program, site: Site, edits: list[Edit]) -> Tensor:
    """The matrix [N, K] that acts on the plain input as the stored one does behind its edits.

    Float64 where a rotation is undone, float32 where it was codes, else as it is stored.
    """
    stored = program.stored(site)
    matrix = stored.dequantize(torch.float32) if isinstance(stored, QuantizedTensor) else stored
    for edit in reversed(edits):
        undone = edit.undo(matrix.double())
        matrix = matrix if undone is None else undone
    return matrix


@dataclass(frozen=True, kw_only=True)
class Target:
    """One form of export.

    Fields:
        form: (format, columns) -> the name of the form that keeps every value, or None.
        write: writes `job.output` and returns what a user should know.
        verify: decodes what was written and compares each value.
        keeps_codes: codes are copied, so a rotation before them cannot be undone.
        bits: (format, columns) -> bits per weight in what is written, where they are not the format's own.
        check: what stands against an export, in sentences.
        refuses: config.json -> what of that stands against any export of the model.
        missing: config.json and the model's folder -> what of that can be given when it is exported.
        suffix: of the default output, behind the checkpoint's name.
    """

    name: str
    summary: str
    suffix: str
    form: FormOf
    write: Callable[[Job], list[str]]
    verify: Callable[[Job], Checked]
    keeps_codes: bool = True
    is_file: bool = False
    bits: Callable[[Format, int], float] | None = None
    check: Callable[[Job], list[str]] = lambda job: []
    refuses: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    missing: Callable[[Mapping[str, Any], Path | None], list[str]] = lambda config, folder: []
