"""One run per output: a lock file beside it, held by the process for as long as it works there."""

import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import TextIO

from aqtx.errors import InputError


class OutputLock:
    """`.NAME.aqtx-lock` beside a folder. The system gives it back when the process ends, however it ends."""

    def __init__(self, output: Path) -> None:
        """Take the lock.

        Raises:
            InputError: another process works on the output; tells which.
        """
        self.output = output
        self.file = output.with_name(f".{output.name}.aqtx-lock")
        self._stream: TextIO | None = None
        while self._stream is None:
            self._take()

    def _take(self) -> None:
        try:
            stream = self.file.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(f"the folder {self.output.parent} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = " ".join(stream.read(200).split()) or "another process"
            stream.close()
            raise InputError(f"{holder} is working on output {self.output}; wait for it or stop it") from None
        except OSError as error:  # a file system that has no locks
            warnings.warn(f"{self.file} cannot be locked ({error.strerror}): start no second run here", stacklevel=2)
        if not self._is_current(stream):
            stream.close()  # its holder removed the file between our opening and locking it: another one counts
            return
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        self._stream = stream

    def _is_current(self, stream: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self.file.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back and take its file away."""
        if self._stream is not None:
            self.file.unlink(missing_ok=True)  # before the lock goes: whoever waits looks whether its file is this one
            self._stream.close()
            self._stream = None
