"""Settings of the whole suite, one thread and no network, and the one run of the quickstart that many tests look at."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything imports torch or a hub client.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@dataclass(frozen=True)
class Quickstart:
    """`aqtx apply quickstart`, run once. Read only: a test that writes copies `directory` first."""

    root: Path  # where it ran; the output is below
    directory: Path
    stdout: str
    cpu_seconds: float
    report: dict[str, Any]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Quickstart:
    """The README's main job, from the command line, in a folder of its own; parallel test processes share it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "quickstart"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes first runs it; given back when the file is closed
        if not (root / "done.json").exists():
            _run_quickstart(root)
    done = json.loads((root / "done.json").read_text())
    directory = root / "out" / "quickstart"
    report = json.loads((directory / "report.json").read_text())
    return Quickstart(root, directory, done["stdout"], done["cpu_seconds"], report)


def _run_quickstart(root: Path) -> None:
    command = [sys.executable, "-m", "aqtx", "apply", "quickstart"]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    (root / "done.json").write_text(json.dumps({"stdout": done.stdout, "cpu_seconds": seconds}))
