"""What each program of `recipes/README.md#deploy` costs with the same codes: tokens per CPU second, memory, size.

    python benchmarks/deploy_cost.py out/deploy --vllm ../vllm/bin/python                  # tinymoe
    python benchmarks/deploy_cost.py out/deploy --model out/smollm2 --vllm ../vllm/bin/python

The model is rounded to nearest in INT4 with groups of 32, where all of them hold it: every matrix but routers and head.
It is exported to each form, and each program runs it in a process of its own on one thread (`deploy_workers.py`):
medians over rounds of CPU seconds, so that other work on the machine is left out. Programs without their package are
left out and named.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

FORMAT = "int4_g32"
WORKER = Path(__file__).with_name("deploy_workers.py")
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def made(source: str, work: Path) -> dict[str, Path]:
    """The model in every form; those that are there are kept."""
    import torch

    import aqtx
    from aqtx.checkpoint.exports.package import package
    from aqtx.checkpoint.exports.run import export
    from aqtx.passes.assign_plan import AssignPlan
    from aqtx.passes.emit import Emit
    from aqtx.passes.quantize import Quantize

    torch.set_num_threads(1)
    folder = work / "model"
    if not folder.exists():
        plan = AssignPlan(method="uniform", candidates=(FORMAT,), keep=("router", "lm_head"))
        aqtx.save(aqtx.run(aqtx.trace(source, dtype=torch.bfloat16), [plan, Quantize(), Emit()]), folder)
    served, file, compiled = work / "model-compressed-tensors", work / "model.gguf", work / "package"
    if not served.exists():
        export(folder, "compressed-tensors", served)
    if not file.exists():
        export(folder, "gguf", file)
    if not (compiled / "model.pt2").exists():
        package(folder, compiled / "model.pt2")
    places = {"vllm": served, "transformers": served, "llama.cpp": file, "package": compiled}
    return {**places, "torch.compile": folder}


def size_of(place: Path) -> int:
    """Bytes of weights, or of all that a package consists of."""
    files = [place] if place.is_file() else list(place.glob("model*.safetensors")) or list(place.iterdir())
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Make what is missing, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--vllm", metavar="PYTHON", help="of the environment that CONTRIBUTING describes")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    places = made(arguments.model, arguments.work)
    pythons = dict.fromkeys(places, sys.executable) | {"vllm": arguments.vllm}
    if importlib.util.find_spec("xllamacpp") is None:
        pythons["llama.cpp"] = None
    print(f"{arguments.model} in {FORMAT}: one sequence, one thread, per CPU second")
    print("| program | decode | prompt | CPU s until ready | memory MB | size MB |\n|---|---:|---:|---:|---:|---:|")
    counts = [str(arguments.prompt), str(arguments.tokens), str(arguments.rounds)]
    for name, place in places.items():
        if pythons[name] is None:
            print(f"| {name} | not installed, left out |")
            continue
        command = [str(pythons[name]), str(WORKER), name, str(place), *counts]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SETTINGS})
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads(done.stdout.splitlines()[-1])
        decode = f"{arguments.tokens / told['decode']:,.0f}" if "decode" in told else ""
        row = [name, decode, f"{arguments.prompt / told['prefill']:,.0f}", f"{told['ready']:.1f}"]
        print(
            "| " + " | ".join([*row, f"{told['memory'] / 1e6:,.0f}", f"{size_of(place) / 1e6:.1f}"]) + " |", flush=True
        )


if __name__ == "__main__":
    main()
