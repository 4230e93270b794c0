"""Find a checkpoint: a local folder, a model shipped with aqtx, or a name on the Hugging Face hub."""

import re
from functools import partial
from pathlib import Path

from aqtx.errors import InputError, nearest, problems_of

_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_SHIPPED = Path(__file__).resolve().parents[1] / "models"
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def inside(folder: Path, file: Path) -> Path:
    """The file with links resolved; links may stay in the folder, or lead to the blobs of the hub's cache.

    Raises:
        InputError: a link leaves the folder, or leads nowhere.
    """
    try:
        real, root = file.resolve(strict=file.is_symlink()), folder.resolve()
    except (OSError, RuntimeError):
        raise InputError(f"{file} is a link that leads nowhere") from None
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if real.is_relative_to(root) or real.is_relative_to(blobs):
        return real
    raise InputError(f"{file} is a link that leaves the checkpoint folder; put the file itself there")


def refuse_links(folder: Path) -> None:
    """InputError for every link of a checkpoint folder that leaves it, and for what would be waited for."""
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}") from None
    problems = [problem for file in files for problem in problems_of(partial(inside, folder, file))]
    problems += [
        f"{file} is a pipe, a socket or a device, and no file of a checkpoint"
        for file in files
        if file.exists() and not file.is_file() and not file.is_dir()
    ]
    if problems:
        raise InputError(*problems)


def shipped() -> dict[str, Path]:
    """Models that come with aqtx, by name."""
    return {path.parent.name: path.parent for path in sorted(_SHIPPED.glob("*/config.json"))}


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint.

    Raises:
        InputError: nothing of that name is here, and the hub has it not or cannot be reached.
    """
    folder = Path(source)
    if _is_folder(folder):
        refuse_links(folder)
        return folder
    own = shipped()
    if str(source) in own:
        return own[str(source)]
    names = ", ".join(own) or "none"
    if not _HUB_NAME.match(str(source)):
        raise InputError(
            f"model {str(source)!r} is neither a folder nor a shipped model ({names}){nearest(str(source), own)}"
        )
    return _from_hub(str(source), names)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:  # a name too long for the file system, a null byte
        raise InputError(f"model {str(path)[:80]!r} is no name of a folder: {error}") from None


def _from_hub(name: str, names: str) -> Path:
    """The hub's cached snapshot, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    unknown = f"model {name!r} is neither a folder nor a shipped model ({names})"
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except GatedRepoError:
        raise InputError(
            f"model {name!r} asks for its licence to be accepted on the hub, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{unknown}, and the hub has no model of that name (a private one needs `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        raise InputError(f"{unknown}, and it is not in the hub's cache while the hub cannot be reached") from None
