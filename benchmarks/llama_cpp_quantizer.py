"""GGUF files of equal bytes: llama.cpp's own quantizer with an importance matrix, and a plan and GPTQ of this project.

    python -m benchmarks.llama_cpp_quantizer LIBRARY tinymoe out/llama Q3_K_M Q4_K_M

llama.cpp quantizes a BF16 file of the model to each type; LIBRARY is that of `llama_cpp_file.py`. Its importance matrix
is what its own tool collects, the mean square of each input, on the calibration text that this project uses too. The
embedding, the head and routers stay as they are in both. The plan then gets the bytes that llama.cpp took.
All files are decoded by `gguf` and scored alike. Arms that are there are not measured again.
`--dtype float32` computes everything in float32, which is many times as fast where a processor multiplies no bf16.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import fx

import aqtx
from aqtx.checkpoint.exports.gguf import entries
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.exports.target import Job
from aqtx.evaluate.arms import evaluate_arms
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.evaluate.statistics import paired_change
from aqtx.registry import Context
from aqtx.runs.arms import open_arms
from aqtx.text.tokens import CalibrationSpec, calibration, load_tokenizer
from benchmarks.arms import measured
from benchmarks.llama_cpp_file import quantize_file

KEEP = ["router", "shared_expert_gate", "lm_head"]
CANDIDATES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "int4_g32", "int5_g32", "int8_g32"]
TEXT = {"source": "builtin", "num_sequences": 64, "sequence_length": 256}


@dataclass(frozen=True)
class Computing:
    """In which dtype all is computed, and on how many held-out tokens arms are scored."""

    dtype: str
    tokens: int


class Squares(fx.Interpreter):
    """Runs the model and sums the squares of each matrix's inputs: weight -> [E, K] and rows [E]."""

    def __init__(self, program: aqtx.Program) -> None:
        super().__init__(program.module())
        self.wanted = {site.node.name: site.weight for site in program.sites()}
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As always, with a look at the inputs of linears."""
        if n.name in self.wanted:
            x, weight, *rest = self.fetch_args_kwargs_from_env(n)[0]
            grouped = weight.dim() == 3
            rows = x.flatten(0, -2).float()
            place = torch.zeros(len(rows), dtype=torch.long)
            if grouped:
                place = torch.searchsorted(rest[0].long(), torch.arange(len(rows)), right=True)
            count = weight.shape[0] if grouped else 1
            name = self.wanted[n.name]
            self.sums.setdefault(name, torch.zeros(count, rows.shape[1])).index_add_(0, place, rows.square())
            self.rows.setdefault(name, torch.zeros(count)).add_(torch.bincount(place, minlength=count))
        return super().run_node(n)


def importance(source: str, dtype: str) -> dict[str, torch.Tensor]:
    """Tensor of the file -> mean square of each input [E * K], one for inputs of experts that no token reached."""
    program = aqtx.trace(source, getattr(torch, dtype))
    seen = Squares(program)
    with torch.no_grad():
        for ids in calibration(CalibrationSpec(**TEXT), load_tokenizer(program.folder), 0).split(8):
            seen.run(ids)
    found = {}
    for entry in entries(Job(program, Path("unused"), {})):
        weight = next((site.weight for site in program.sites() if f"{site.name}.weight" == entry.keys[0]), None)
        if weight in seen.sums:
            means = seen.sums[weight] / seen.rows[weight].clamp_min(1)[:, None]
            found[entry.name] = torch.where(seen.rows[weight][:, None] > 0, means, 1.0).flatten()
    return found


def planned_bytes(file: Path) -> tuple[int, int]:
    """Bytes and weights of the matrices that are quantized."""
    matrices = [
        tensor
        for tensor in GGUFReader(file).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1 and "gate_inp" not in tensor.name
    ]
    return sum(int(tensor.n_bytes) for tensor in matrices), sum(int(tensor.n_elements) for tensor in matrices)


def score(file: Path, how: Computing) -> dict[str, Any]:
    """Scores and size of one file, decoded."""
    spec = EvaluateSpec(perplexity="builtin", max_tokens=how.tokens, window=512)
    results = evaluate_arms(
        open_arms([f"arm={file}"], dtype=getattr(torch, how.dtype)), spec, progress=Context().progress
    )
    size, weights = planned_bytes(file)
    types: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    scores = results.perplexity["arm"].to_json()
    return {"scores": scores, "bytes": size, "bits": size * 8 / weights, "types": types}


def plain(source: str, out: Path) -> Path:
    """The model as a BF16 file."""
    file = out / "bf16.gguf"
    return file if file.exists() else export(source, "gguf", file).path


def theirs(library: Path, source: str, out: Path, kind: str, how: Computing) -> dict[str, Any]:
    """llama.cpp's file of a type, scored."""
    file = out / f"llama.cpp-{kind}.gguf"
    if not file.exists():
        quantize_file(library, plain(source, out), file, kind, importance(source, how.dtype))
    return score(file, how)


def ours(source: str, out: Path, kind: str, how: Computing) -> dict[str, Any]:
    """A file of no more bytes by this project, scored."""
    size, weights = planned_bytes(out / f"llama.cpp-{kind}.gguf")
    folder, file = out / f"aqtx-{kind}", out / f"aqtx-{kind}.gguf"
    if not file.exists():
        plan = {"method": "fisher", "target": "llama.cpp", "candidates": CANDIDATES, "keep": KEEP}
        recipe = {"version": 1, "seed": 0, "model": {"source": source, "dtype": how.dtype}, "output": str(folder)}
        passes = [{"assign_plan": {**plan, "average_bits": size * 8 / weights}}, "gptq", "emit"]
        aqtx.apply({**recipe, "calibration": TEXT, "report": False, "passes": passes}, overwrite=True)
        export(folder, "gguf", file)
    return score(file, how)


def main() -> None:
    """Measure what is missing, print a row per arm and the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("types", nargs="+", metavar="TYPE", help="of llama.cpp, as Q4_K_M")
    parser.add_argument("--dtype", default="bfloat16", help="in which all is computed")
    parser.add_argument("--tokens", type=int, default=100_000, help="of held-out text (default: 100,000)")
    arguments = parser.parse_args()
    source, out, how = arguments.source, arguments.out, Computing(arguments.dtype, arguments.tokens)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Any] = {}
    for kind in arguments.types:
        arms[f"llama.cpp {kind}"] = partial(theirs, arguments.library, source, out, kind, how)
        arms[f"aqtx {kind}"] = partial(ours, source, out, kind, how)
    found = measured(out / "scores", {**arms, "bf16": lambda: score(plain(source, out), how)})
    scores = {name: DocumentScores.from_json(arm["scores"]) for name, arm in found.items()}
    for name, arm in found.items():
        change = paired_change(scores["bf16"], scores[name])
        print(
            f"{name}: {arm['bits']:.4f} bits, {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]", arm["types"]
        )
    for kind in arguments.types:
        change = paired_change(scores[f"llama.cpp {kind}"], scores[f"aqtx {kind}"])
        told = {"pair": kind, "change": [round(value, 4) for value in (change.value, change.low, change.high)]}
        print(json.dumps(told))


if __name__ == "__main__":
    main()
