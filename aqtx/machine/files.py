"""Files and folders: digests, small files that are whole or absent, records that know when they are damaged."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from aqtx.errors import InputError

STAGED = ".new"  # what a file is called until it is whole
_LARGEST_JSON = 500_000_000  # bytes: the plan of a model of a million matrices has less
_AGAIN = "start again with --overwrite"


def make_folder(folder: Path) -> None:
    """A folder that a user named, with those above it; InputError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the folder {folder} cannot be made: {getattr(error, 'strerror', error)}") from None


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write a small file so that a reader finds the old one or the new one, whole, whatever happens in between."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """The same of bytes; folders above the file are made."""
    staged = file.with_name(file.name + STAGED)
    make_folder(file.parent)
    with writing(file, len(content)):
        with staged.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(file)


def write_record(file: Path, content: Any) -> None:
    """Write JSON data together with its digest, for `read_record`."""
    body = json.dumps(content)
    write_text(file, json.dumps({"sha256": text_digest(body), "body": body}))


def read_record(file: Path, *, remedy: str = _AGAIN) -> Any:
    """The data that `write_record` was given.

    Raises:
        InputError: a byte of it has changed since; names the file and what to do.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        body = record["body"]
        if record["sha256"] == text_digest(body):
            return json.loads(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # told below, like a digest that differs
    raise InputError(f"{file}: resume data is missing or damaged (its SHA-256 differs); {remedy}")


def read_json(file: Path) -> Any:
    """A JSON file's content.

    Raises:
        InputError: it is no regular file, too large, not UTF-8, not JSON, or nested too deeply.
    """
    try:
        if not file.is_file():  # a named pipe would be waited for
            raise InputError(f"{file} is no file" if file.exists() else f"{file} is missing")
        if file.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{file} is larger than {_LARGEST_JSON:,} bytes, which no such file is")
        return json.loads(file.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


@contextmanager
def writing(file: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn what a file system says while `file` is written into a sentence with the bytes that it needs.

    Raises:
        InputError: the disk is full, the folder cannot be written, the name is too long.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _reason(error, file, num_bytes)
        if reason is None:
            raise
        raise InputError(f"{file} cannot be written: {reason}") from error


def _reason(error: Exception, file: Path, num_bytes: int) -> str | None:
    """Why a write failed, in words; None for a failure that is not of the file system."""
    number, words = getattr(error, "errno", None), str(error)
    folder = next((parent for parent in file.parents if parent.is_dir()), Path())
    free = shutil.disk_usage(folder).free
    short = "requested and" in words and "written" in words  # how numpy tells of a write that was cut short
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in words or short:
        needed = f"{num_bytes:,} bytes are needed" if num_bytes else "more room is needed"
        return f"the disk is full; {needed} and {free:,} are free in {folder}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "os error 13" in words or "os error 30" in words:
        return f"the folder {folder} is read-only or not yours"
    return getattr(error, "strerror", None)


def file_state(file: Path) -> tuple[int, int, int] | None:
    """Size, time and inode: what changes when somebody writes to a file or puts another in its place."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
