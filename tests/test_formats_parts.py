"""Parts that do not go together are refused where a packed tensor is made, and again in front of the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats import MixedExperts, QuantizedTensor, kernel, parse, quantize
from aqtx.formats.grouped_linear import grouped_linear
from tests.formats.cases import normal

needs_kernel = pytest.mark.skipif(not kernel.available(), reason="no compiled kernel")
NAMES = ["mxfp4", "mxfp6", "nvfp4", "int4_asym", "int3_asym", "int8_row", "int4_g32", "fp8", "q3_k", "q4_k", "bf16"]


def wrong(part: Tensor) -> dict[str, Tensor]:
    """A part of another size, rank or dtype."""
    return {
        "one row": part[:1],
        "no rows": part[:0],
        "fewer columns": part[..., : part.shape[-1] - 1],
        "another dtype": part.double(),
        "another rank": part[None],
    }


def cases(parts: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """The parts with one of them wrong, missing or too much."""
    found = []
    for name, part in parts.items():
        for how, changed in wrong(part).items():
            if changed.shape != part.shape or changed.dtype is not part.dtype:
                found.append((f"{name} of {how}", {**parts, name: changed}))
        if name != "qdata":
            found.append((f"no {name}", {other: value for other, value in parts.items() if other != name}))
    others = ("scale", "zero_point", "per_tensor_scale", "super_scale")
    found += [(f"a {name}", {**parts, name: torch.zeros(1)}) for name in others if name not in parts]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_wrong_parts_are_refused_from_disk_and_in_memory(name: str) -> None:
    made = quantize(normal(6, 160, dtype=torch.bfloat16), name)
    accepted = []
    for how, parts in cases(made.to_disk()):
        try:
            QuantizedTensor.from_disk(parts, name, (6, 160), torch.bfloat16)
            accepted.append(f"from disk: {how}")
        except InputError:
            pass
    for how, parts in cases(made.parts()):
        if how == "qdata of one row" and len(parts) == 1:
            continue  # plain values: another matrix
        rest = dict(parts)
        try:
            QuantizedTensor(rest.pop("qdata"), name, 160, torch.bfloat16, **rest)
            accepted.append(f"in memory: {how}")
        except InputError:
            pass
    rows_alone = [f"in memory: qdata of {how}" for how in ("no rows", "another rank")] if name == "bf16" else []
    assert accepted == rows_alone


@needs_kernel
@pytest.mark.parametrize("name", [name for name in NAMES if kernel.decodes(parse(name)) and name != "bf16"])
def test_the_kernel_refuses_what_it_would_read_past(name: str) -> None:
    made, x = quantize(normal(6, 160), name), normal(2, 160, seed=1)
    spec, ops = kernel.spec_of(made.format, 160), torch.ops.aqtx_cpu

    def given(parts: dict[str, Tensor]) -> list[Tensor | None]:
        return [parts.get(part) for part in ("qdata", "scale", "zero_point", "per_tensor_scale")]

    assert torch.equal(ops.dequantize(*given(made.parts()), spec, 160, torch.float32), made.dequantize(torch.float32))
    accepted = []
    strided = {
        part: torch.stack([value, value], -1)[..., 0] for part, value in made.parts().items() if value.numel() > 1
    }
    attempts = [*cases(made.parts()), *((f"{part} strided", {**made.parts(), part: s}) for part, s in strided.items())]
    for how, parts in attempts:
        if how in ("per_tensor_scale of another rank", "a super_scale"):
            continue  # one number a matrix, however it is laid out; and what the ops are not given
        stacked = [part[None] for part in given(parts) if part is not None]
        calls = {
            "linear": lambda parts=parts: ops.linear(x, *given(parts), spec, 160),
            "dequantize": lambda parts=parts: ops.dequantize(*given(parts), spec, 160, torch.float32),
            "grouped": lambda stacked=stacked: ops.grouped(x, torch.tensor([2]), stacked, spec, [0], 6),
        }
        for call, attempt in calls.items():
            try:
                if parts.get("scale") is not None:
                    attempt()
                    accepted.append(f"{call}: {how}")
            except RuntimeError as error:
                accepted += [] if "aqtx: " in str(error) else [f"{call} fails by itself: {how}"]
    assert accepted == []


@needs_kernel
def test_the_grouped_kernel_refuses_rows_and_slots_that_are_not_there() -> None:
    made, x = quantize(normal(2, 6, 160), "mxfp4"), normal(4, 160)
    spec, parts = kernel.spec_of(made.format, 160), list(made.parts().values())
    fine = torch.ops.aqtx_cpu.grouped(x, torch.tensor([1, 4]), parts, spec, [1, 0], 6)
    assert fine.shape == (4, 6)
    wrong = [([1, 9], [1, 0], 6), ([1, 4], [1, 2], 6), ([1, 4], [1, -1], 6), ([1, 4], [1], 6), ([1, 4], [1, 0], 7)]
    for ends, slots, num_outputs in wrong:
        with pytest.raises(RuntimeError, match="aqtx"):
            torch.ops.aqtx_cpu.grouped(x, torch.tensor(ends), parts, spec, slots, num_outputs)


INDEXINGS = {
    "[::2]": lambda w: w[::2], "[1:3]": lambda w: w[1:3], "[-2:]": lambda w: w[-2:], "[0:0]": lambda w: w[0:0],
    "[1]": lambda w: w[1], "[-1]": lambda w: w[-1], "[:, 2]": lambda w: w[:, 2], "[:, 1::3]": lambda w: w[:, 1::3],
    "[1:, :5]": lambda w: w[1:, :5], "[::2][1]": lambda w: w[::2][1], "[2][::2]": lambda w: w[2][::2],
    "[:, ::2][:, 1]": lambda w: w[:, ::2][:, 1], "[..., 3]": lambda w: w[..., 3], "[..., 1:5]": lambda w: w[..., 1:5],
    "[[2, 0]]": lambda w: w[[2, 0]], "rows": lambda w: w.index_select(-2, torch.tensor([3, 1])),
    "[None]": lambda w: w[None], "[...]": lambda w: w[...],
    "[:, :]": lambda w: w[:, :],
    "picked": lambda w: w.index_select(0, torch.tensor([2, 0, 2])),
    "narrow": lambda w: w.narrow(0, 1, 2), "unbind": lambda w: w.unbind(0)[1], "chunk": lambda w: w.chunk(2)[1],
    "flip": lambda w: w.flip(0), "t": lambda w: w.mT, "view": lambda w: w.reshape(-1, w.shape[-1]),
    "expand": lambda w: w.expand(2, *w.shape), "masked": lambda w: w[torch.tensor([True, False, True, False])],
}  # fmt: skip


def product(weight: Tensor, num_columns: int) -> Tensor:
    """With few rows of float32 activations: a linear, or one a matrix of a stack."""
    if weight.dim() == 2:
        return F.linear(normal(3, num_columns, seed=2), weight)
    rows = normal(weight.shape[0], num_columns, seed=2)
    return grouped_linear(rows, weight, torch.arange(1, weight.shape[0] + 1, dtype=torch.int32))


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_an_index_means_what_it_means_for_the_values(
    name: str, with_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_kernel:
        monkeypatch.setattr(kernel, "available", lambda: False)
    returned = 0
    for shape in ((4, 7, 160), (4, 160)):
        made = quantize(normal(*shape), name)
        for how, index in INDEXINGS.items():
            try:
                part = index(made)
            except (NotImplementedError, IndexError):
                continue
            expected = index(made.dequantize())
            returned += 1
            assert part.shape == expected.shape and torch.equal(part.dequantize(), expected), (how, shape)
            if expected.shape[0]:
                torch.testing.assert_close(product(part, 160), product(expected, 160), rtol=1e-5, atol=1e-4)
            single = normal(160, seed=3)
            if part.dim() == 2 and len(part):
                torch.testing.assert_close(F.linear(single, part), F.linear(single, expected), rtol=1e-5, atol=1e-4)
    assert returned >= 15


def test_an_index_of_mixed_experts_keeps_the_dtype_of_the_stack() -> None:
    weights = [quantize(normal(8, 64), "mxfp4"), normal(8, 64), quantize(normal(8, 64, seed=1), "int4")]
    stack = MixedExperts.from_experts(weights, torch.bfloat16)
    dense = stack.dequantize()
    for index in (0, 1, 2, -1, -3):
        part = stack[index]
        values = part.dequantize() if isinstance(part, QuantizedTensor) else part
        assert values.dtype is torch.bfloat16 and torch.equal(values, dense[index])
    with pytest.raises(InputError, match="slots"):
        MixedExperts(stack.buckets, (0, 1, 1), torch.bfloat16)


def test_one_row_of_float64_is_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "available", lambda: False)
    for name in ("mxfp4", "int4_asym", "nvfp4"):
        made, x = quantize(normal(16, 256), name), normal(1, 256, seed=1).double() * (1 + 2.0**-40)
        exact = F.linear(x, made.dequantize(torch.float64))
        assert (F.linear(x, made) - exact).abs().max() <= 1e-13 * exact.abs().max(), name


SANITIZED = """
import sys, pytest
from aqtx.formats import kernel
kernel.FLAGS += ["-fsanitize=address", "-g", "-O1"]
assert kernel.available()
import torch
bad = torch.zeros(4, dtype=torch.uint8)
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@needs_kernel
@pytest.mark.slow
def test_the_kernels_under_the_address_sanitizer(tmp_path: Path) -> None:
    """Every kernel test once more, in code that aborts at the first byte read or written outside an allocation."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second one too, or the first cannot let an exception through
    ]
    if not all(Path(library).is_absolute() for library in found):
        pytest.skip("no address sanitizer")
    root, here = Path(__file__).parents[1], Path(__file__).parent
    environment = {
        **os.environ, "PYTHONPATH": str(root), "AQTX_CACHE_DIR": str(tmp_path), "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "PYTHONMALLOC": "malloc",
    }  # fmt: skip
    files = ["test_formats_kernel.py", "test_formats_decoding.py", "test_formats_parts.py", "test_gptq.py"]
    skipped = "not lesser and not without_a_compiler"
    command = [sys.executable, "-c", SANITIZED, *(str(here / file) for file in files), "-k", skipped]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
