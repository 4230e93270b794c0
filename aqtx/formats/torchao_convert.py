"""To and from torchao's own tensor classes, exact in both directions, and its safetensors registry.

On GPUs torchao computes MX and NVFP4 with hardware instructions and INT4 with kernels of `mslk`; its classes are the
conversion target there. Codes are copied, never rounded again. torchao keeps 6-bit codes in whole bytes and E8M0 scales
as float8_e8m0fnu; both change on the way and back without loss.
"""

from typing import Any

import torch

from aqtx.errors import InputError
from aqtx.formats.packing import from_disk_order, pack, to_disk_order
from aqtx.formats.table import E8M0, NVFP4_SCALE, Format, parse
from aqtx.formats.tensor import QuantizedTensor
from aqtx.formats.torchao_base import import_quietly

# our format -> torchao's name of the element and the dtype of its codes
_MX_ELEMENTS: dict[str, tuple[Any, torch.dtype]] = {
    "mxfp4": (torch.float4_e2m1fn_x2, torch.uint8),
    "mxfp6_e2m3": ("fp6_e2m3", torch.uint8),
    "mxfp6_e3m2": ("fp6_e3m2", torch.uint8),
    "mxfp8_e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "mxfp8_e5m2": (torch.float8_e5m2, torch.float8_e5m2),
}


def class_of(fmt: Format, num_columns: int) -> str | None:
    """The name of torchao's class for a format in rows of so many weights, None where there is none."""
    if num_columns % fmt.block_size(num_columns) or fmt.scale.code_bits:
        return None
    if fmt.scale is E8M0:
        return "MXTensor"
    if fmt.scale is NVFP4_SCALE:
        return "NVFP4Tensor"
    if fmt.element.is_float or not fmt.is_packed:
        return None
    return "Int4Tensor" if _is_int4(fmt, num_columns) else "IntxUnpackedToInt8Tensor"


def _is_int4(fmt: Format, num_columns: int) -> bool:
    """Symmetric INT4 in whole bytes. An offset in bf16, as `Int4Tensor` keeps it, would round zero points."""
    return fmt.element.name == "int4" and not fmt.asymmetric and num_columns % 2 == 0


def _to_int4(tensor: QuantizedTensor) -> Any:
    """Two codes a byte in two's complement, the first in the low half; scales by group first, as its kernel asks."""
    assert tensor.scale is not None
    data = to_disk_order(tensor.codes() ^ 8, 4)  # from offset binary
    scale = tensor.scale.transpose(-1, -2).contiguous()
    blocks = [*(1 for _ in tensor.shape[:-1]), tensor.format.block_size(tensor.num_columns)]
    made = import_quietly("torchao.quantization").Int4Tensor
    return made(data, scale, torch.zeros_like(scale), blocks, tensor.shape)


def values_of(tensor: Any) -> torch.Tensor:
    """What torchao's tensor stands for. `Int4Tensor` has no `dequantize`, and multiplies with a GPU kernel only."""
    if type(tensor).__name__ != "Int4Tensor":
        made: torch.Tensor = tensor.dequantize()
        return made
    codes = (from_disk_order(tensor.qdata, 4, tensor.shape[-1]) ^ 8).to(tensor.dtype) - 8
    groups = codes.unflatten(-1, (-1, tensor.block_size[-1]))
    scale, zero = (part.transpose(-1, -2)[..., None] for part in (tensor.scale, tensor.zero_point))
    return (groups * scale + zero).flatten(-2)


def _to_intx(tensor: QuantizedTensor) -> Any:
    """Integers of any width in whole bytes, as torchao keeps them: values and zero points less 2^(b-1)."""
    fmt, block = tensor.format, tensor.format.block_size(tensor.num_columns)
    assert tensor.scale is not None
    middle = 2 ** (fmt.element.bits - 1)
    values = (tensor.codes().to(torch.int16) - middle).to(torch.int8)
    zero = torch.zeros_like(tensor.scale, dtype=torch.int8)
    if tensor.zero_point is not None:
        zero = (tensor.zero_point.to(torch.int16) - middle).to(torch.int8)
    made = import_quietly("torchao.quantization").IntxUnpackedToInt8Tensor
    kind = getattr(torch, f"int{fmt.element.bits}")
    return made(values, tensor.scale, zero, kind, (1, block), tensor.orig_dtype, None)


def rounds_inputs(fmt: Format, activation: str) -> bool:
    """Whether torchao's tensor of a weight also rounds what it is multiplied with, as this project does by the name.

    It does for MX, which torchao multiplies with rounded inputs only; inputs in NVFP4 have one outer scale there, and
    here one a token.
    """
    inputs = parse(activation)
    return fmt.scale is E8M0 and inputs.scale is E8M0 and inputs.rule == parse(inputs.name.partition("@")[0]).rule


def _input_rounding(activation: str) -> Any:
    element, _ = _MX_ELEMENTS[parse(activation).name.partition("@")[0]]
    return import_quietly("torchao.prototype.mx_formats.mx_tensor").QuantizeTensorToMXKwargs(elem_dtype=element)


def to_torchao(tensor: QuantizedTensor, activation: str | None = None) -> Any:
    """torchao's tensor with the same codes and scales. InputError where it has no class for the format.

    `activation` names the format of its inputs; it is left out where `rounds_inputs` says no.
    """
    fmt = tensor.format
    block = fmt.block_size(tensor.num_columns)
    if fmt.scale.code_bits or (fmt.element.is_float and fmt.scale not in (E8M0, NVFP4_SCALE)):
        raise InputError(f"torchao has no tensor class for {fmt.name}: only INT, MX and NVFP4 formats convert")
    if tensor.num_columns % block:
        raise InputError(f"torchao takes whole blocks of {block} only, not rows of {tensor.num_columns}")
    assert tensor.scale is not None
    if not fmt.element.is_float:
        is_int4 = _is_int4(fmt, tensor.num_columns) and tensor.orig_dtype == tensor.scale.dtype == torch.bfloat16
        return _to_int4(tensor) if is_int4 else _to_intx(tensor)
    codes = tensor.codes()
    if fmt.scale is NVFP4_SCALE:
        assert tensor.per_tensor_scale is not None
        scale = tensor.scale.view(torch.float8_e4m3fn)
        per_matrix = tensor.per_tensor_scale if tensor.dim() == 3 else tensor.per_tensor_scale.reshape(())
        made = import_quietly("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor
        return made(to_disk_order(codes, 4), scale, block, tensor.orig_dtype, per_tensor_scale=per_matrix)
    element, dtype = _MX_ELEMENTS[fmt.name.partition("@")[0]]
    data = to_disk_order(codes, 4) if fmt.element.bits == 4 else codes.contiguous()
    scale = tensor.scale.view(torch.float8_e8m0fnu)
    preference = import_quietly("torchao.quantization.quantize_.common.kernel_preference").KernelPreference.EMULATED
    made = import_quietly("torchao.prototype.mx_formats.mx_tensor").MXTensor
    inputs = _input_rounding(activation) if activation is not None and rounds_inputs(fmt, activation) else None
    return made(data.view(dtype), scale, element, block, tensor.orig_dtype, preference, inputs, False)


def from_torchao(tensor: Any, scale_rule: str | None = None) -> QuantizedTensor:
    """The `QuantizedTensor` of an `MXTensor` or `NVFP4Tensor`; `scale_rule` records how its scales were chosen."""
    if type(tensor).__name__ not in ("MXTensor", "NVFP4Tensor"):
        raise InputError(f"cannot convert a {type(tensor).__name__}: only torchao's MXTensor and NVFP4Tensor")
    if tensor.is_swizzled_scales or not tensor.qdata.is_contiguous():
        raise InputError("cannot convert a torchao tensor with swizzled scales or transposed data")
    num_columns, per_matrix = tensor.shape[-1], None
    if type(tensor).__name__ == "NVFP4Tensor":
        fmt = parse("nvfp4", scale_rule=scale_rule)
        given = tensor.per_tensor_scale
        leading = (*tensor.shape[:-2], 1, 1)
        per_matrix = (
            torch.ones(leading, device=tensor.device) if given is None else given.float().expand(leading).clone()
        )
    else:
        names = {element: name for name, (element, _) in _MX_ELEMENTS.items()}
        fmt = parse(names[tensor.elem_dtype], scale_rule=scale_rule)
        if tensor.block_size != fmt.block:
            raise InputError(
                f"cannot convert an MXTensor with blocks of {tensor.block_size}: MX blocks are {fmt.block}"
            )
    data = tensor.qdata.view(torch.uint8)
    codes = from_disk_order(data, 4, num_columns) if fmt.element.bits == 4 else data
    scale = tensor.scale.view(torch.uint8).reshape(*tensor.shape[:-1], -1)
    qdata = pack(codes, fmt.element.bits)
    return QuantizedTensor(qdata, fmt.name, num_columns, tensor.orig_dtype, scale, None, per_matrix)


def register_safetensors() -> None:
    """Let torchao's safetensors helpers, and transformers through them, save and load `QuantizedTensor`."""
    registry = import_quietly("torchao.prototype.safetensors.safetensors_utils")
    registry.ALLOWED_CLASSES["QuantizedTensor"] = QuantizedTensor
    allowed = registry.ALLOWED_TENSORS_SUBCLASSES
    if "QuantizedTensor" not in allowed:
        allowed.append("QuantizedTensor")
