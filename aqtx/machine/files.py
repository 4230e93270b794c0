"""Folders and digests."""

import hashlib
from pathlib import Path

from aqtx.errors import InputError


def make_folder(folder: Path) -> None:
    """A folder that a user named, with those above it; InputError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
