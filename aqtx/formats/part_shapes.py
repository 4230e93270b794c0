"""What the parts of a packed weight must look like, in memory and on disk; whatever is made of parts is held to it.

The kernels read raw memory, so a scale that is too short or of another dtype would be read past its end or as other
numbers. The same is checked once more in front of them, in kernels/checks.h.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats.packing import memory_bytes
from aqtx.formats.table import BF16_SCALE, NVFP4_SCALE, Format

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(fmt: Format, shape: tuple[int, ...], *, on_disk: bool) -> Layout:
    """Shape and dtype of each part of a weight `shape` [.., N, K]."""
    *leading, num_columns = shape
    if not fmt.is_packed:
        return {"qdata": (tuple(shape), torch.bfloat16)}
    num_bytes = fmt.row_bytes(num_columns) if on_disk else memory_bytes(num_columns, fmt.element.bits)
    if bits := fmt.scale.code_bits:
        count = fmt.num_scale_codes(num_columns)
        return {
            "qdata": ((*leading, num_bytes), torch.uint8),
            "scale": ((*leading, -(-count * bits // 8) if on_disk else count), torch.uint8),
            "super_scale": ((*leading, fmt.num_supers(num_columns)), torch.float16),
        }
    blocks = (*leading, fmt.num_blocks(num_columns))
    wanted: Layout = {
        "qdata": ((*leading, num_bytes), torch.uint8),
        "scale": (blocks, torch.bfloat16 if fmt.scale is BF16_SCALE else torch.uint8),
    }
    if fmt.asymmetric:
        wanted["zero_point"] = (blocks, torch.uint8)
    if fmt.scale is NVFP4_SCALE:
        wanted["per_tensor_scale"] = ((*leading[:-1], 1, 1), torch.float32)
    return wanted


def check(parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...], *, on_disk: bool = False) -> None:
    """InputError with everything that is wrong with the parts of a weight `shape` [.., N, K]."""
    if len(shape) < 2 or shape[-1] < 1:
        raise InputError(f"a weight of {fmt.name} is [.., N, K] with K of at least 1, not {list(shape)}")
    wanted, problems = layout(fmt, shape, on_disk=on_disk), []
    for name, (size, dtype) in wanted.items():
        part = parts.get(name)
        if part is None:
            problems.append(f"a weight {list(shape)} of {fmt.name} has no {name}")
        elif tuple(part.shape) != size or part.dtype is not dtype:
            found = f"{part.dtype} {list(part.shape)}"
            problems.append(f"{name} of a weight {list(shape)} of {fmt.name} must be {dtype} {list(size)}, not {found}")
        elif part.device != parts["qdata"].device:
            problems.append(f"{name} lies on {part.device}, its codes on {parts['qdata'].device}")
    problems += [f"a weight of {fmt.name} has no place for a {name}" for name in parts if name not in wanted]
    if problems:
        raise InputError(*problems)
