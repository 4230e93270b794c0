"""What oneDNN and torch keep of shapes that come once: a bounded number, so memory does not grow with the text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aqtx.numerics.products import SMALLEST, _has_onednn

CHILD = f"""
import torch
from aqtx.machine.memory import release_unused, resident_bytes
from aqtx.machine.one_dnn import keep_few_kernels
from aqtx.numerics.products import product

torch.set_num_threads(1)
keep_few_kernels()
W, seen = torch.ones({SMALLEST}, {SMALLEST}), []
for rows in range({SMALLEST}, {SMALLEST} + 230):
    product(torch.ones(rows, {SMALLEST}), W)
    if rows in ({SMALLEST} + 129, {SMALLEST} + 229):
        release_unused()
        seen.append(resident_bytes())
print(seen[1] - seen[0])
"""


@pytest.mark.skipif(not _has_onednn(), reason="torch has no oneDNN here")
def test_shapes_that_come_once_are_not_kept() -> None:
    """A hundred shapes more, each with a description of 0.3 MB: held to 128 they replace those before."""
    quiet = {name: value for name, value in os.environ.items() if not name.endswith("_CAPACITY")}
    command, root = [sys.executable, "-c", CHILD], Path(__file__).parents[1]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) < 10_000_000
