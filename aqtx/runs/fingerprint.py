"""What a run's result depends on, so that a resumed run can tell what has changed since."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aqtx.errors import InputError
from aqtx.machine.files import file_state, sha256
from aqtx.runs.recipe import Recipe
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
    return {file.name: sha256(file) for file in _source_files(folder) if file.is_file()}


class SourceWatch:
    """The files of a checkpoint as they were when a run began; whoever replaces one meanwhile is found out."""

    def __init__(self, folder: Path | None) -> None:
        self._states = {} if folder is None else {file: file_state(file) for file in _source_files(folder)}

    def check(self) -> None:
        """InputError when a file has another size, time or inode than at the start."""
        changed = [str(file) for file, state in self._states.items() if file_state(file) != state]
        if changed:
            raise InputError(
                *(
                    f"{file} was changed while the run was reading it; restore it and --resume, or start again with "
                    "--overwrite"
                    for file in changed
                )
            )


def _source_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in ("*.json", "*.safetensors", "*.model") for file in folder.glob(pattern))


def origin(recipe: Recipe, folder: Path | None) -> dict[str, Any]:
    """What the result of a recipe comes from, as far as files tell: itself, the weights, the text."""
    text = recipe.evaluate.perplexity if recipe.evaluate is not None else None
    return {
        "recipe": recipe.resolved(),
        "source": source_hashes(folder) if folder is not None else {},
        "calibration text": text_hashes(*recipe.calibration.weights),
        "evaluation files": text_hashes(text) if text is not None else {},
    }


def text_hashes(*sources: str) -> dict[str, str]:
    """SHA-256 of the files of text sources, by path; nothing for those that are known by their names."""
    files: list[Path] = []
    for root in map(Path, sources):
        files += sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
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
