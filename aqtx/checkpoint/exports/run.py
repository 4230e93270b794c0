"""One export from beginning to end: refuse, write under a temporary name, verify, rename."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from aqtx.checkpoint.exports.clients import CLIENTS
from aqtx.checkpoint.exports.compare import Checked
from aqtx.checkpoint.exports.nearest_form import nearest_form
from aqtx.checkpoint.exports.table import TARGETS
from aqtx.checkpoint.exports.target import Client, Job, Matrix, Target, captured
from aqtx.checkpoint.open import open_program
from aqtx.checkpoint.write import MODEL_FILES, write_checksums
from aqtx.errors import InputError, nearest
from aqtx.formats import QuantizedTensor
from aqtx.formats.table import NVFP4_SCALE, Format, parse
from aqtx.machine.command_output import made_file, made_folder
from aqtx.machine.marker import own_files
from aqtx.program.edits import QuantizeActivation, by_weight, in_force
from aqtx.program.program import Program

_FILES = (*MODEL_FILES, "generation_config.json", "model.safetensors", "model-*.safetensors")
_TOLD = 3  # problems of one kind that are told one by one


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. `clients` load it; `notes` are what a user should know; `checked` is None where not asked."""

    path: Path
    bytes: int
    clients: tuple[str, ...]
    notes: list[str]
    checked: Checked | None


def export(
    source: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    template: Path | None = None,
    verify: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Exported:
    """Write a checkpoint in the form `to` (a name of `TARGETS`).

    Args:
        output: a new or empty folder, or a new file; the default lies beside the source.
        template: a GGUF file that metadata and tokenizer are taken from.
        verify: decode what was written and compare each value.
        dtype: of plain weights, where the form is `dequantized`.

    Raises:
        InputError: something has no form there, or no client would load it; nothing is left behind.
    """
    if to not in TARGETS:
        raise InputError(f"no export {to!r}{nearest(to, TARGETS)} (known: {', '.join(TARGETS)})")
    target = TARGETS[to]
    place = Path(output) if output is not None else _beside(source, target)
    with (
        made_file(place, "export") if target.is_file else made_folder(place, "export", _FILES, replace=False) as staged
    ):
        program = open_program(source, None, check_files=True)
        job = Job(program, staged, _formats(program), Path(source).name, template, dtype)
        clients, notes = check(job, target)
        notes += target.write(job)
        checked = target.verify(job) if verify else None
        if checked is not None and checked.problems:
            raise InputError(*_first(checked.problems, "what was written is not what was meant: "))
        if staged.is_dir():
            write_checksums(staged, own_files(staged))
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    return Exported(
        path=place, bytes=sum(file.stat().st_size for file in files), clients=clients, notes=notes, checked=checked
    )


def check(job: Job, target: Target) -> tuple[tuple[str, ...], list[str]]:
    """The clients that load this form of the checkpoint, and what a user should know of the others.

    Raises:
        InputError: there is no form, or no client.
    """
    problems = [*formless(job.formats, job, target), *target.check(job)]
    rotated = _rotated(job)
    if target.keeps_codes and (coded := [name for name in rotated if name in job.formats]):
        problems.append(
            f"a rotation runs before {len(coded)} quantized matrices, first {coded[0]}, and {target.name} keeps codes: "
            "add `fuse_hadamard`, or leave `insert_hadamard` out, or export `--to dequantized`"
        )
    if problems:
        raise InputError(*problems)
    notes = []
    if rotated:
        notes.append(f"a rotation ran before {len(rotated)} matrices, first {rotated[0]}: undone in their weights")
    clients = [client for client in CLIENTS.values() if client.target == target.name]
    refused = {client.name: client_problems(job, client) for client in clients}
    loads = tuple(name for name, why in refused.items() if not why)
    if clients and not loads:
        raise InputError(*(sentence for why in refused.values() for sentence in _first(why)))
    others = [(client, why[0].removeprefix(f"{client}: ")) for client, why in refused.items() if why]
    return loads, [*notes, *(f"not for {client}: {why}" for client, why in others)]


def formless(formats: dict[str, Format], job: Job, target: Target) -> list[str]:
    """A sentence for each format without a form, with its matrices and the nearest format that a client takes there."""
    sites, lost = job.sites, dict[tuple[str, int], list[str]]()
    clients = [client for client in CLIENTS.values() if client.target == target.name]
    for name, fmt in formats.items():
        columns = sites[name].shape[1]
        if target.form(fmt, columns) is None:
            lost.setdefault((fmt.name, columns), []).append(name)
    told = []
    for (name, columns), members in lost.items():

        def runs(fmt: Format, member: str = members[0], columns: int = columns) -> bool:
            if target.form(fmt, columns) is None:
                return False
            matrix = Matrix(member, columns, job.program.config)
            return not clients or any(client.refuses(fmt, matrix) is None for client in clients)

        told.append(no_form(target.name, parse(name), members, columns, runs))
    return told


def no_form(
    where: str, fmt: Format, members: list[str], columns: int, has_form: Callable[[Format], bool], why: str = ""
) -> str:
    """`gguf has no form for mxfp8_e4m3 of 64 matrices with rows of 256, first ...: the nearest that has is int8`."""
    other = nearest_form(fmt, columns, has_form)
    told = f"; the nearest that has one is {other}" if other else ""
    reason = f" ({why})" if why else ""
    return (
        f"{where} has no form for {fmt.name} in rows of {columns}{reason}: {len(members)} matrices, "
        f"first {members[0]}{told}"
    )


def client_problems(job: Job, client: Client) -> list[str]:
    """Why a client would not load or rightly run this checkpoint."""
    target, sites, refused = TARGETS[client.target], job.sites, dict[tuple[str, str, int], list[str]]()
    for name, fmt in job.formats.items():
        if why := client.refuses(fmt, Matrix(name, sites[name].shape[1], job.program.config)):
            refused.setdefault((fmt.name, why, sites[name].shape[1]), []).append(name)
    problems = []
    for (name, why, columns), members in refused.items():

        def runs(fmt: Format, member: str = members[0], columns: int = columns) -> bool:
            matrix = Matrix(member, columns, job.program.config)
            return target.form(fmt, columns) is not None and client.refuses(fmt, matrix) is None

        problems.append(no_form(client.name, parse(name), members, columns, runs, why))
    inputs = {name: client.refuses_inputs(name, how) for name, how in job.activations().items() if name in job.formats}
    told = [(name, why) for name, why in inputs.items() if why]
    problems += [f"{client.name}: {told[0][1]}: {len(told)} matrices, first {told[0][0]}"] if told else []
    named = {name: job.formats[name].name if name in job.formats else None for name in sites}
    return [*problems, *client.unlike(named), *_unshared(job, client)]


def _unshared(job: Job, client: Client) -> list[str]:
    """NVFP4 matrices that a client fuses under one outer scale though theirs differ."""
    outer = [name for name, fmt in job.formats.items() if fmt.scale is NVFP4_SCALE]
    for pattern in client.shared_scale:
        for members in captured(pattern, outer).values():
            stored = [job.program.stored(job.sites[name]) for name in members]
            scales = {
                float(part.per_tensor_scale)
                for part in stored
                if isinstance(part, QuantizedTensor) and part.per_tensor_scale is not None
            }
            if len(scales) > 1:
                others = ", ".join(name.rpartition(".")[2] for name in members[1:])
                return [
                    f"{client.name} fuses {members[0]} with {others} under one outer scale of NVFP4, and theirs "
                    "differ: take mxfp4 there"
                ]
    return []


def _formats(program: Program) -> dict[str, Format]:
    """Formats of the quantized sites, in the model's order; bf16 stores the values themselves."""
    told: dict[str, str] = program.config.get("quantization_config", {}).get("formats", {})
    found = {site.name: parse(told[site.name]) for site in program.sites() if site.name in told}
    return {name: fmt for name, fmt in found.items() if fmt.is_packed}


def _rotated(job: Job) -> list[str]:
    """Sites before which something runs that is no rounding of inputs."""
    edits = by_weight(job.program.edits)
    return [
        name
        for name, site in job.sites.items()
        if any(not isinstance(edit, QuantizeActivation) for edit in in_force(edits.get(site.weight, [])))
    ]


def _beside(source: str | Path, target: Target) -> Path:
    own = Path(source)
    return own.with_name(f"{own.name}{target.suffix}")


def _first(problems: Iterable[str], before: str = "") -> list[str]:
    told = list(problems)
    more = [f"and {len(told) - _TOLD} more of the kind"] if len(told) > _TOLD else []
    return [f"{before}{problem}" for problem in told[:_TOLD]] + more
