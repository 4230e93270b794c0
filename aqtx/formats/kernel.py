"""The optional compiled CPU kernel: built once with g++, cached, and never required.

`available()` answers whether its ops (`torch.ops.aqtx_cpu`) can be used, and builds them at the first
question. The library is keyed by its sources, torch's version and the compiler's, so a change of any
makes a new one beside the old. Without a compiler one line says so and everything runs in plain torch.
The sources choose vector code by the processor they run on, not the one they were built on.

AQTX_KERNEL=off     never build or load it
AQTX_CACHE_DIR=DIR  where built libraries are kept (default: ~/.cache/aqtx)
AQTX_CPU=NAME       use no more of the processor than avx512, avx2 or baseline have (default: all of it)
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from aqtx.formats.kernel_cache import cache_folder, is_trusted, keep
from aqtx.formats.scales import Affine, Scales
from aqtx.formats.table import BF16_SCALE, E8M0, NVFP4_SCALE, Format

SOURCES = Path(__file__).parent / "kernels"
SCALE_KINDS = {E8M0.name: 0, BF16_SCALE.name: 1, NVFP4_SCALE.name: 2}
RULES = {"floor": 0, "even": 1, "rceil": 2, "search": 3}
# No contraction: a fused multiply-add would change a rounding. The other two change no value, they let loops vectorise.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]


@cache
def available() -> bool:
    """Whether the compiled ops can be used; builds and loads them the first time."""
    if os.environ.get("AQTX_KERNEL", "auto") == "off" or sys.platform != "linux":
        return False
    try:
        if not hasattr(torch.ops.aqtx_cpu, "linear"):  # a copy that came with a package may be loaded already
            torch.ops.load_library(str(library()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sys.stderr.write(f"aqtx: no compiled CPU kernel, plain torch is used instead ({reason})\n")
        return False
    _register_fakes()
    return True


def serves(device: torch.device | str) -> bool:
    """Whether tensors on this device go through the compiled ops."""
    return torch.device(device).type == "cpu" and available()


def decodes(fmt: Format) -> bool:
    """Whether the ops know a format's stored scales."""
    return not fmt.is_packed or fmt.scale.name in SCALE_KINDS


def library() -> Path:
    """The library's file, built if it is not there; OSError or SubprocessError where it cannot be."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found")
    sources = sorted(SOURCES.iterdir())
    target = cache_folder() / f"aqtx_cpu-{_key(sources, compiler)}.so"
    if not is_trusted(target):
        with tempfile.TemporaryDirectory(dir=target.parent) as staging:
            made = Path(staging) / target.name
            _compile(compiler, [source for source in sources if source.suffix == ".cpp"], made)
            keep(made, target)
    return target


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """Each source by a process of its own, then the library."""
    root = Path(torch.__file__).parent
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    compiling = [
        _start([compiler, *FLAGS, f"-I{root / 'include'}", "-c", str(source), "-o", str(made)])
        for source, made in zip(sources, objects, strict=True)
    ]
    for process in compiling:
        _finish(process)
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _finish(_start([compiler, "-shared", "-fopenmp", *map(str, objects), *libraries, "-o", str(target)]))


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=900)
    if process.returncode:
        first = next((line for line in errors.splitlines() if "error" in line), "unknown reason")
        raise OSError(f"the compiler failed: {first}")


def _key(sources: list[Path], compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    digest = hashlib.sha256("|".join([torch.__version__, platform.machine(), version, *FLAGS]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def spec_of(fmt: Format, num_columns: int) -> list[int]:
    """What the kernel needs to know of a format, as integers; see register.cpp."""
    if not fmt.is_packed:
        return [16, 0, 0, 0, 0, 0, 0]
    element = fmt.element
    kind = SCALE_KINDS.get(fmt.scale.name, SCALE_KINDS[BF16_SCALE.name])  # of others only codes are computed here
    extras = [int(fmt.asymmetric or fmt.scale.has_minimum), int(fmt.scale is NVFP4_SCALE)]
    return [element.bits, element.mantissa_bits, element.exponent_bias, kind, fmt.block_size(num_columns), *extras]


def linear(x: Tensor, qdata: Tensor, scales: Scales, fmt: Format, num_columns: int) -> Tensor:
    """`x @ w.T` for one packed matrix."""
    parts, spec = _contiguous(qdata, scales), spec_of(fmt, num_columns)
    return torch.ops.aqtx_cpu.linear(x, *parts, spec, num_columns)


def dequantize(qdata: Tensor, scales: Scales, fmt: Format, num_columns: int, dtype: torch.dtype) -> Tensor:
    """The values of one packed matrix, bit for bit those of `QuantizedTensor.dequantize`."""
    parts, spec = _contiguous(qdata, scales), spec_of(fmt, num_columns)
    return torch.ops.aqtx_cpu.dequantize(*parts, spec, num_columns, dtype)


def _contiguous(qdata: Tensor, scales: Scales) -> list[Tensor | None]:
    """The parts as the ops take them: a slice of a weight has strides."""
    return [None if part is None else part.contiguous() for part in (qdata, *scales[:3])]


def can_quantize(weight: Tensor, fmt: Format) -> bool:
    """MX formats, on a CPU."""
    known = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and fmt.scale is E8M0 and fmt.rule in RULES and serves(weight.device)


def quantize_mx(weight: Tensor, fmt: Format, row_bytes: int) -> tuple[Tensor, Tensor]:
    """(codes in the memory layout, scales) of a finite weight [.., K]."""
    spec = spec_of(fmt, weight.shape[-1])
    return torch.ops.aqtx_cpu.quantize_mx(weight, spec, fmt.element.largest, RULES[fmt.rule], row_bytes)


def best_scales(
    runs: Tensor, weights: Tensor, candidates: Affine, fmt: Format, *, to_bf16: bool, both_signs: bool
) -> Tensor:
    """Index [R] of the candidate [C, R] of least squared error; runs [R, B], weights [P, B] of row r % P.

    With `both_signs` those with their sign changed are the candidates from C on.
    """
    spec, (scale, zero_point, _) = spec_of(fmt, runs.shape[-1]), candidates
    how = (to_bf16, both_signs)
    return torch.ops.aqtx_cpu.best_scales(runs, weights, scale, zero_point, spec, fmt.element.largest, *how)


def _fake_linear(  # noqa: PLR0913 (the op's signature)
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    per_tensor: Tensor | None,
    spec: list[int],
    num_columns: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_grouped(
    x: Tensor, offsets: Tensor, parts: list[Tensor], specs: list[int], slots: list[int], num_outputs: int
) -> Tensor:
    return x.new_empty(x.shape[0], num_outputs)


def _fake_experts(x: Tensor, *how: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)


def _register_fakes() -> None:
    torch.library.register_fake("aqtx_cpu::linear", _fake_linear)
    torch.library.register_fake("aqtx_cpu::grouped", _fake_grouped)
    torch.library.register_fake("aqtx_cpu::attention", _fake_attention)
    torch.library.register_fake("aqtx_cpu::experts", _fake_experts)
