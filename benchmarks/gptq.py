"""GPTQ of one mixture-of-experts layer: aqtx against llm-compressor and GPTQModel, and how it scales.

    python -m venv venvs/llmc && venvs/llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv venvs/gptqmodel && venvs/gptqmodel/bin/pip install torch==2.13.0 <requirements but torch>
    venvs/gptqmodel/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0  # asks for 2.14, runs on 2.13
    python -m benchmarks.gptq compare --llmcompressor venvs/llmc/bin/python --gptqmodel venvs/gptqmodel/bin/python
    python -m benchmarks.gptq scale --figure gptq_scaling.png

One thread everywhere, CPU seconds of the process (wall seconds mean little on a shared machine), the same
weights, rows and format; the clock runs from rows to rounded weights (ours as packed codes, the peers' as floats),
Hessians included. The error is the held-out output error over that of our round-to-nearest, mean over experts and
projections.

Of ours, "full" is the pass's default. "ordered" rounds each column once at the scales of the rule, and "plain" has no
act-order and no shrinkage either. Each peer runs twice. "default" is all that it takes unless told otherwise: static
act-order in llm-compressor, activation-aware order of groups with a damping of 0.05 in GPTQModel. "plain" has no
act-order and our damping of 0.01. Their int4 scale is 2 amax / 15 where ours is amax / 7: round-to-nearest alone is
.893 with it, and the row "plain, 2 amax / 15" is ours on their scale.
What was measured stands in benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor

from aqtx.blockwise.gptq_block import POOL_STRIDE, SHARES, SOLVE_BYTES
from aqtx.blockwise.input_moments import Moments
from aqtx.formats import QuantizedTensor, fake_quantize, parse
from aqtx.formats.scales import Scales, to_blocks
from aqtx.formats.table import Format
from aqtx.numerics.gptq import Curvature, Options
from aqtx.numerics.shrinkage import pooled_prior
from aqtx.report.canvas import panels, save_figure
from benchmarks.gptq_problem import held_out_error, make_problem

PROJECTIONS = ("gate", "up", "down")
# the algorithm as published: each column is rounded once, at the scales of the rule
ONCE = {"search_scales": False, "sweeps": 0}
SETTINGS: dict[str, dict[str, Any]] = {"plain": {"order": "none", **ONCE}, "ordered": ONCE, "full": {}}


def run_ours(problem: dict[str, Tensor], format_name: str, setting: str) -> tuple[dict[str, Tensor], float]:
    """Rounded weights and CPU seconds, with the batches and the shared moments of the `gptq` pass."""
    options, shrinks = Options(**{"order": "activation", **SETTINGS[setting]}), setting != "plain"
    found: dict[str, list[QuantizedTensor]] = {name: [] for name in PROJECTIONS}
    started = time.process_time()
    for rows_name, projections in (("rows", ("gate", "up")), ("inner", ("down",))):
        rows, (count, height, width) = problem[rows_name], problem[projections[0]].shape
        prior = None
        if shrinks and rows_name == "rows":
            pool = Moments.empty([0], width, rows.device)
            pool.add(rows[::POOL_STRIDE], None)
            pool.finish()
            prior = pooled_prior(pool.H[0], pool.tokens[0])
        quantum = max(SOLVE_BYTES["cpu"] // (4 * (8 * height * width + 3 * width**2)), 1)
        quantum = min(quantum, -(-count // SHARES))
        for experts in torch.arange(count).split(quantum):
            moments = Moments.empty(experts.tolist(), width, rows.device)
            moments.add(rows, problem["offsets"])
            moments.finish()
            tokens = moments.tokens if shrinks else None
            curvature = Curvature.of(moments.H, num_tokens=tokens, prior=prior, options=options)
            for name in projections:
                found[name].append(curvature.solve(problem[name][experts], parse(format_name)).tensor)
    seconds = time.process_time() - started
    return {name: torch.cat([part.dequantize() for part in parts]) for name, parts in found.items()}, seconds


def peers_scales(weight: Tensor, fmt: Format, *, largest: Tensor | None = None) -> Scales:
    """The scale of both peers for int4: 2 amax / 15 of each block."""
    return Scales((to_blocks(weight, fmt).abs().amax(-1) * (2 / 15)).to(torch.bfloat16))


def run_peer(
    python: str, *, script: str, source: Path, format_name: str, setting: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same from a peer's own environment, and what it says of itself: `cpu_seconds`, `act-order`, `damping`."""
    target = source.with_suffix(".out")
    file = Path(__file__).parent / "gptq_peers" / script
    command = [python, str(file), str(source), str(target), format_name, setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given")
    return load_file(target), json.loads(done.stdout.strip().splitlines()[-1])


def error_over_nearest(problem: dict[str, Tensor], format_name: str, out: dict[str, Tensor]) -> float:
    """Mean over experts and projections."""
    ratios = []
    for name in PROJECTIONS:
        nearest = held_out_error(problem, name, fake_quantize(problem[name], format_name.partition("@")[0]))
        ratios.append(held_out_error(problem, name, out[name]) / nearest)
    return float(torch.stack(ratios).mean())


def compare(arguments: argparse.Namespace) -> None:
    """Table of seconds and errors."""
    problem = make_problem(arguments.experts, arguments.hidden, arguments.intermediate, arguments.tokens)
    counts = problem["offsets"].diff(prepend=torch.zeros(1, dtype=torch.int32))
    print(
        f"{arguments.experts} experts, {arguments.hidden} x {arguments.intermediate}, "
        f"tokens {int(counts.min())}..{int(counts.max())} (mean {float(counts.float().mean()):.0f})"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "problem.safetensors"
        save_file(problem, source)
        for format_name in arguments.formats.split(","):
            for setting in SETTINGS:
                out, seconds = run_ours(problem, format_name, setting)
                tell(format_name, f"aqtx, {setting}", seconds, error_over_nearest(problem, format_name, out))
            if format_name == "int4":
                with patch.object(sys.modules[Curvature.__module__], "choose_scales", peers_scales):
                    out, seconds = run_ours(problem, format_name, "plain")
                tell(format_name, "plain, 2 amax / 15", seconds, error_over_nearest(problem, format_name, out))
            for name, python in (("llm-compressor", arguments.llmcompressor), ("GPTQModel", arguments.gptqmodel)):
                if python is not None:
                    compare_peer(problem, source, format_name, name=name, python=python)


def compare_peer(problem: dict[str, Tensor], source: Path, format_name: str, *, name: str, python: str) -> None:
    """A peer at its defaults, then without act-order; one that fails is told, not skipped."""
    script = f"run_{name.replace('-', '').lower()}.py"
    for setting in ("default", "plain"):
        try:
            out, told = run_peer(python, script=script, source=source, format_name=format_name, setting=setting)
        except RuntimeError as error:
            print(f"{format_name:8} {name}, {setting} did not run: {error}", flush=True)
            continue
        ratio = error_over_nearest(problem, format_name, out)
        remark = f"   act-order {told['act-order'] or 'none'}, damping {told['damping']:g}"
        tell(format_name, f"{name}, {setting}", told["cpu_seconds"], ratio, remark)


def tell(format_name: str, name: str, seconds: float, error: float, remark: str = "") -> None:
    """One line of the table."""
    print(f"{format_name:8} {name:23} {seconds:8.2f} CPU s   error / nearest {error:.4f}{remark}", flush=True)


SHAPES = {  # experts, hidden, intermediate, tokens per expert
    "experts": [(count, 512, 512, 512) for count in (4, 8, 16, 32)],
    "tokens per expert": [(8, 512, 512, count) for count in (64, 256, 1024, 4096)],
    "width": [(4, width, width, 512) for width in (256, 512, 1024, 2048)],
}


def scale(arguments: argparse.Namespace) -> None:
    """CPU seconds against experts, tokens and width, one at a time, the best of three, as a figure."""
    format_name, found = arguments.formats.split(",")[0], {}
    for name, shapes in SHAPES.items():
        place = {"experts": 0, "width": 1, "tokens per expert": 3}[name]
        found[name] = {
            shape[place]: min(run_ours(problem, format_name, "full")[1] for _ in range(3))
            for shape, problem in ((shape, make_problem(*shape)) for shape in shapes)
        }
        print(name, {count: round(seconds, 3) for count, seconds in found[name].items()}, flush=True)
    save_figure(lambda: drawn(found), Path(arguments.figure))


def drawn(found: dict[str, dict[int, float]]) -> Figure:
    """One panel for what varies, both axes in powers of two."""
    figure, axes = panels(1, len(found))
    for panel, (name, points) in zip(axes, found.items(), strict=True):
        panel.loglog(list(points), list(points.values()), marker="o", base=2)
        panel.set_xticks(list(points), [str(count) for count in points])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set(xlabel=name, ylabel="CPU seconds a layer")
    return figure


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "scale"])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512, help="mean per expert")
    parser.add_argument("--formats", default="int4,mxfp4")
    parser.add_argument("--llmcompressor", help="python of an environment that has it")
    parser.add_argument("--gptqmodel", help="python of an environment that has it")
    parser.add_argument("--figure", default="gptq_scaling.png")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    {"compare": compare, "scale": scale}[arguments.what](arguments)


if __name__ == "__main__":
    main()
