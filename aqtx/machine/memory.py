"""How much memory is free, and how much this process has taken at most."""

import ctypes
import os
import re
import resource
import threading
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken now without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", told.read_text())
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def room_for_work(device: torch.device, max_memory: int | None = None) -> int:
    """Bytes that work may still take: what is free less a tenth, and what a promised limit leaves beside this process.

    The limit is one of `resident_bytes`; of a GPU it is one of the GPU's own memory.
    """
    room = free_bytes(device) * 9 // 10
    if max_memory is not None:
        room = min(room, max_memory - (resident_bytes() if device.type == "cpu" else 0))
    return max(room, 0)


def release_unused() -> None:
    """Hand freed memory back to the system, where the C library can: else its heap keeps what large tensors left."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def bytes_of(text: str) -> int:
    """ "8GiB", "500 MB" or "1000000" as a number.

    Raises:
        ValueError: it is none of them.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is no size: write bytes or such as 8GiB or 500MB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def resident_bytes() -> int:
    """Anonymous and shared memory of this process; pages mapped from files can be dropped and do not count."""
    told = Path("/proc/self/status")
    if not told.exists():
        return 0
    return 1024 * sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", told.read_text()))


def peak_bytes() -> int:
    """The largest resident size of this process so far, mapped pages included.

    Not `ru_maxrss` where Linux tells better: that starts at the size of the process that started this one.
    """
    told = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", told.read_text()) if told.exists() else None
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * kilobytes


class PeakMemory:
    """Context that watches `resident_bytes` from a thread; `num_bytes` is the largest value seen."""

    def __init__(self, every_seconds: float = 0.02) -> None:
        self.num_bytes = resident_bytes()
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.num_bytes = max(self.num_bytes, self.measure())

    def measure(self) -> int:
        """What is watched."""
        return resident_bytes()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.num_bytes = max(self.num_bytes, self.measure())
