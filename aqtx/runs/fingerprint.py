"""What a run's result depends on, so that a resumed run can tell what has changed since."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aqtx.machine.files import sha256
from aqtx.version import __version__

_LIBRARIES = ("torch", "torchao", "transformers", "safetensors", "numpy")


def versions() -> dict[str, Any]:
    """Versions, machine type and thread count: what byte-identical reruns have in common."""
    found: dict[str, Any] = {"aqtx": __version__, "python": platform.python_version()}
    found.update({name: importlib.metadata.version(name) for name in _LIBRARIES})
    found["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found["threads"] = torch.get_num_threads()
    return found


def source_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the checkpoint's config, weights and tokenizer."""
    files = sorted(file for pattern in ("*.json", "*.safetensors", "*.model") for file in folder.glob(pattern))
    return {file.name: sha256(file) for file in files}


def text_hashes(source: str) -> dict[str, str]:
    """SHA-256 of the files of a text source, by path; nothing for one that is known by its name."""
    root = Path(source)
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return {str(file): sha256(file) for file in files if file.is_file()}


def ids_hash(documents: Iterable[torch.Tensor]) -> str:
    """One digest over the token ids of documents."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(ids.numpy().tobytes() + b"|")
    return digest.hexdigest()


def code_hash() -> str:
    """One digest over the package's own source files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")) + sorted((root / "passes").rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def first_difference(before: Any, after: Any, where: str = "") -> str | None:
    """A sentence on the first place where two fingerprints differ, or None."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            found = first_difference(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            found = first_difference(one, other, f"{where}.{index}")
            if found:
                return found
        return None
    return None if before == after else f"{where} was {before!r} and is now {after!r}"
