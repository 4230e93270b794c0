"""Alpha of a layer of experts: ours against one svdvals per matrix and against WeightWatcher.

    python -m benchmarks.alpha            # an OLMoE layer: 64 experts x 3 matrices of 1024 x 2048
    python -m benchmarks.alpha --weightwatcher /path/to/other/venv/bin/python --weightwatcher-matrices 16

All run on one thread in one go, on the same bf16 matrices (noise with a power-law of strong directions, as
training leaves). WeightWatcher wants its own packages, so it runs in an interpreter of its own, which needs
torch and `pip install weightwatcher`. It reports the exponent under its own threshold rule, which is our
`threshold="ks"`. Times are CPU seconds: a busy machine does not change who wins.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch
from safetensors.torch import save_file
from torch import Tensor

_WEIGHTWATCHER = """
import json, sys, time, warnings, logging
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
import torch, weightwatcher
from safetensors.torch import load_file
torch.set_num_threads(1)
stack = load_file(sys.argv[1])["W"].float()
model = torch.nn.Sequential(*(torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in stack))
for layer, w in zip(model, stack):
    layer.weight.data = w
watcher = weightwatcher.WeightWatcher(model=model, log_level=logging.CRITICAL)
started = time.process_time()
details = watcher.analyze()
seconds = time.process_time() - started
found = {"seconds": seconds, "alpha": details.alpha.tolist(), "version": weightwatcher.__version__}
print("RESULT" + json.dumps(found))
"""


def matrices(count: int, shape: tuple[int, int]) -> Tensor:
    """bf16 matrices of noise with directions of falling strength on top."""
    g = torch.Generator().manual_seed(0)
    stack = torch.empty(count, *shape, dtype=torch.bfloat16)
    for e in range(count):
        strength = 3.0 * torch.arange(1, 65) ** (-0.3 - 0.5 * torch.rand((), generator=g))
        U, V = torch.randn(shape[0], 64, generator=g), torch.randn(64, shape[1], generator=g)
        stack[e] = 0.02 * (torch.randn(shape, generator=g) + (U * strength) @ V / 20)
    return stack


def seconds_of(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def by_svdvals(stack: Tensor) -> Tensor:
    """The formula on the singular values of each matrix in turn."""
    alphas = []
    for w in stack:
        lam = torch.linalg.svdvals(w.float()).square()
        k = max(10, len(lam) // 10)
        alphas.append(1 + k / float((lam[:k] / lam[k]).log().sum()))
    return torch.tensor(alphas, dtype=torch.float64)


def by_weightwatcher(stack: Tensor, python: str) -> tuple[float, Tensor, str]:
    """WeightWatcher's analysis in its own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stack.safetensors"
        save_file({"W": stack}, file)
        done = subprocess.run([python, "-c", _WEIGHTWATCHER, str(file)], capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if "RESULT" in line), None)
    if line is None:
        raise SystemExit(f"WeightWatcher failed:\n{done.stderr[-2000:]}")
    found = json.loads(line[line.index("RESULT") + 6 :])
    return found["seconds"], torch.tensor(found["alpha"], dtype=torch.float64), found["version"]


def main() -> None:
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=192)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="interpreter that can import weightwatcher")
    parser.add_argument("--weightwatcher-matrices", type=int, default=16, metavar="N", help="the first N only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from aqtx.numerics.alpha import analyze

    stack = matrices(arguments.matrices, (arguments.rows, arguments.columns))
    analyze(stack[:1])  # warm up the libraries
    ours, alpha = seconds_of(lambda: analyze(stack).alpha)
    farms, _ = seconds_of(lambda: analyze(stack, spectra="farms").alpha)
    svd, reference = seconds_of(lambda: by_svdvals(stack))
    print(f"{len(stack)} matrices of {arguments.rows} x {arguments.columns}, bf16, one thread, CPU seconds")
    print(f"  aqtx, full spectrum     {ours:8.2f}")
    print(f"  aqtx, FARMS             {farms:8.2f}")
    difference = float((alpha / reference - 1).abs().max())
    print(f"  svdvals per matrix      {svd:8.2f}   {svd / ours:5.1f}x ours, alphas differ by {difference:.1e}")
    if arguments.weightwatcher:
        some = stack[: arguments.weightwatcher_matrices]
        search, ks = seconds_of(lambda: analyze(some, threshold="ks").alpha)
        theirs, values, version = by_weightwatcher(some, arguments.weightwatcher)
        difference = float((ks / values - 1).abs().max())
        print(f"the first {len(some)} of them")
        print(f"  aqtx, threshold ks      {search:8.2f}")
        print(f"  weightwatcher {version:9s} {theirs:8.2f}   {theirs / search:5.1f}x ours, differ by {difference:.1e}")


if __name__ == "__main__":
    main()
