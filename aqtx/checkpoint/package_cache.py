"""Compiled `step` entries in the user's cache, by the content of the checkpoint and of all that compiled them.

A package is code, so it is kept and trusted as the compiled kernel is (`formats/kernel_cache.py`): in a folder that
only this user writes, with its digest beside it. The few that were used last stay.
"""

import hashlib
import os
import platform
from pathlib import Path

import torch

from aqtx.errors import InputError
from aqtx.formats import kernel
from aqtx.formats.kernel_cache import cache_folder, is_trusted, keep, note_of
from aqtx.formats.tensor import SOURCE_HASH
from aqtx.machine.files import sha256
from aqtx.program.ahead_of_time import compile_entry
from aqtx.program.package import Package, open_package
from aqtx.program.program import Program
from aqtx.version import __version__

KEPT = 4
_PATTERN = "step-*.pt2"


def find(folder: Path, device: torch.device) -> Package | None:
    """The package of a checkpoint, if one is kept and whole. Hashes the checkpoint, but only where any is kept."""
    cache = cache_folder()
    if not any(cache.glob(_PATTERN)):
        return None
    file = cache / _name(folder, device)
    if not is_trusted(file):
        return None
    os.utime(file)
    return open_package(file)


def make(folder: Path, program: Program) -> tuple[Package, Path]:
    """Compile the package of a checkpoint and keep it.

    Raises:
        InputError: see `compile_entry`.
    """
    cache = cache_folder()
    file = cache / _name(folder, program.device)
    staged = cache / f"making-{os.getpid()}-{file.name}"
    try:
        compile_entry(program, "step", staged, {"model": folder.name})
        keep(staged, file)
    finally:
        staged.unlink(missing_ok=True)
        note_of(staged).unlink(missing_ok=True)
    for old in sorted(cache.glob(_PATTERN), key=lambda found: found.stat().st_mtime)[:-KEPT]:
        note_of(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return open_package(file), file


def _name(folder: Path, device: torch.device) -> str:
    """Of everything that decides what is compiled."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise InputError(f"{folder} holds no safetensors, so no package of it can be kept")
    with_kernel = device.type == "cpu" and kernel.available()
    capability = torch.backends.cpu.get_cpu_capability()
    own = [__version__, SOURCE_HASH, torch.__version__, platform.machine(), capability, os.environ.get("CXX", "")]
    digest = hashlib.sha256("|".join([*own, str(device), str(with_kernel), str(torch.get_num_threads())]).encode())
    for file in files:
        if file in weights or file.name == "config.json":
            digest.update(f"{file.name} {sha256(file)}".encode())
    return f"step-{digest.hexdigest()[:24]}.pt2"
