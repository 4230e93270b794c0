"""An entry compiled ahead of time: one .pt2 file that holds code and packed weights, and needs no graph of ours.

bound graph -> torch.export -> AOTInductor -> FILE.pt2, which torch loads in Python and in C++.

On a CPU packed weights, experts and attention over a cache go to ops of the compiled kernel (`formats/kernel.py`), so
whoever loads the package loads that library first. Without the kernel (AQTX_KERNEL=off) a matrix decodes in plain torch
ops and the package needs nothing, but experts have no such form. What would be called in Python is refused.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor, kernel, parse
from aqtx.formats.grouped_linear_packed import dense_product
from aqtx.formats.mixed import UNQUANTIZED, MixedExperts
from aqtx.machine.files import writing
from aqtx.program.bound_values import value_of
from aqtx.program.cache_spec import CacheSpec, of_graph, to_text
from aqtx.program.fuse_experts import fuse_experts
from aqtx.program.fuse_linears import fuse_linears
from aqtx.program.hadamard_op import OP as HADAMARD
from aqtx.program.program import Program
from aqtx.program.run_ops import traced
from aqtx.program.token_ids import num_positions, num_tokens
from aqtx.version import __version__

ENTRIES = ("step", "score")
KERNEL_OPS = "aqtx_cpu::"
_DYNAMIC = torch.export.Dim.DYNAMIC
_GROUPED = torch.ops.aqtx.grouped_linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_PLAIN_SPEC = [16, 0, 0, 0, 0, 0, 0]  # as `kernel.spec_of` tells of a weight that is not packed
_EXAMPLE = (2, 16, 32)  # sequences, tokens and cache slots to trace with; none of them may be 1, which is special


def compile_entry(program: Program, entry: str, file: Path, told: Mapping[str, str]) -> bool:
    """Write an entry of a program to `file`, whose name ends in .pt2; whether loading it takes the compiled kernel.

    `told` goes into the package's metadata beside what `open_package` asks for.

    Raises:
        InputError: the model has no such entry, holds an op that only Python knows, or there is no C++ compiler.
    """
    module = cast(fx.GraphModule, program.module(entry))
    for node in module.graph.nodes:
        node.target = traced(node.target)
    if _is_native(program.device):
        fuse_linears(module)
        fuse_experts(module)
    _lower_plain_experts(module, program.device)
    _lower_attention(module, program.device)
    _refuse_python(module, program.device)
    caches = of_graph(program.entry(entry)) if entry == "step" else []
    arguments, dynamic = _inputs(caches, program.device)
    with torch.no_grad():
        exported = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
    told = {**told, "aqtx": __version__, "torch": torch.__version__, "entry": entry, "device": program.device.type}
    limits = {"tokens": str(num_tokens(program)), "positions": str(num_positions(program))}
    _compile(exported, file, {**told, **limits, "caches": to_text(caches)})
    return _needs_kernel(file)


def _compile(exported: torch.export.ExportedProgram, file: Path, told: Mapping[str, str]) -> None:
    from torch._inductor import aot_compile, exc  # takes a second, and only packages need it
    from torch._inductor.package.package import package_aoti

    arguments, _ = exported.example_inputs
    scratch = tempfile.mkdtemp(prefix="aqtx-package-")  # torch's own cache would keep a copy of all weights for ever
    options = {"aot_inductor.package": True, "aot_inductor.output_path": scratch, "aot_inductor.metadata": dict(told)}
    try:
        with writing(file):
            made = aot_compile(exported.module(check_guards=False), arguments, options=options)
            package_aoti(str(file), cast(list[Any], made))
    except exc.InvalidCxxCompiler:
        raise InputError("a package is compiled C++, and there is no C++ compiler: install g++ or set CXX") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _inputs(caches: list[CacheSpec], device: torch.device) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs to trace with, and which of their dimensions are dynamic."""
    batch, length, slots = _EXAMPLE
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    free = {0: _DYNAMIC, 1: _DYNAMIC}
    if not caches:
        return (ids,), (free,)
    pos, start = torch.arange(length, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    grows = [{0: _DYNAMIC} | {at: _DYNAMIC for at, size in enumerate(spec.sizes, 1) if size is None} for spec in caches]
    made = [spec.make(batch, slots, device) for spec in caches]
    return (ids, pos, start, made), (free, {0: _DYNAMIC}, {0: _DYNAMIC}, grows)


def _is_native(device: torch.device) -> bool:
    """Whether the package may call the compiled kernel."""
    return device.type == "cpu" and kernel.available()


def _lower_plain_experts(module: fx.GraphModule, device: torch.device) -> None:
    """Experts that are not packed: the same products, bit for bit, by an op that is no Python."""
    for node in module.graph.nodes:
        if node.target is not _GROUPED or isinstance(value_of(module, node.args[1]), QuantizedTensor | MixedExperts):
            continue
        if device.type != "cpu":
            node.target = dense_product
        elif _is_native(device):
            x, weight, offsets = node.args
            experts, rows, _ = value_of(module, weight).shape
            node.target = torch.ops.aqtx_cpu.grouped.default
            node.args = (x, offsets, [weight], _PLAIN_SPEC, list(range(experts)), rows)
    module.recompile()


def _lower_attention(module: fx.GraphModule, device: torch.device) -> None:
    """Attention over a cache by an op that reads only the slots in use; torch's own packs and reads all of them.

    The same function, rounded elsewhere. Calls of another form than `models/attention.py` makes stay as they are.
    """
    if not _is_native(device):
        return
    for node in list(module.graph.nodes):
        if node.target is not _ATTENTION or len(node.args) != 4 or not set(node.kwargs) <= {"enable_gqa", "scale"}:
            continue
        query, mask = (argument and argument.meta.get("val") for argument in (node.args[0], node.args[3]))
        if query is None or mask is None or mask.dtype is not torch.bool or mask.dim() != 4:
            continue
        scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
        node.target, node.args, node.kwargs = torch.ops.aqtx_cpu.attention.default, (*node.args, float(scale)), {}
    module.recompile()


def _refuse_python(module: fx.GraphModule, device: torch.device) -> None:
    """InputError where a node would be called in Python by whoever runs the package."""
    native = device.type != "cpu" or kernel.available()
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", None) != "aqtx" or node.target is HADAMARD:
            continue
        if node.target is not _GROUPED:
            raise InputError(
                f"{node.target} of node {node.name} runs in Python only, so this model has no package; leave "
                "activations unquantized (no `aq` in the plan)"
            )
        if not native:
            raise InputError(
                f"experts (node {node.name}) need the compiled kernel in a package for a CPU, and there is none: unset "
                "AQTX_KERNEL, and install g++"
            )
        unknown = _undecoded(value_of(module, node.args[1])) if device.type == "cpu" else []
        if unknown:
            raise InputError(
                f"experts (node {node.name}) of {', '.join(unknown)}, which the compiled kernel does not decode, have "
                "no package for a CPU: give them another format"
            )


def _undecoded(value: Tensor) -> list[str]:
    """Formats of a stack of experts that the compiled kernel does not know."""
    names = value.formats if isinstance(value, MixedExperts) else [getattr(value, "format_name", UNQUANTIZED)]
    return sorted({name for name in names if not kernel.decodes(parse(name))})


def _needs_kernel(file: Path) -> bool:
    """Whether the compiled code calls the kernel's ops; InputError where it calls one that Python would have to run."""
    called = calls_of(file)
    if python := sorted(name for name in called if name.startswith("aqtx::")):
        raise InputError(f"the package would call {', '.join(python)} in Python, so there is none for this model")
    return any(name.startswith(KERNEL_OPS) for name in called)


def calls_of(file: Path) -> set[str]:
    """Names of the ops that the code of a package calls through torch's dispatcher."""
    with zipfile.ZipFile(file) as archive:
        lists = [name for name in archive.namelist() if name.endswith(".wrapper.json")]  # none where it calls none
        told = [node for name in lists for node in json.loads(archive.read(name))["nodes"]]
    return {node["node"]["target"] for node in told}
