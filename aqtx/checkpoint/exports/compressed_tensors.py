"""compressed-tensors: what vLLM and transformers load. Codes and scales are kept bit for bit.

`weight_packed` holds a row's codes low bits first, which is this project's order on disk, seen as int32 words (rows
padded to whole words); MX and NVFP4 codes stay bytes. Zero points are packed along the rows. NVFP4's outer scale is
stored as its inverse. Read from the code of compressed-tensors 0.20 and of vLLM 0.32 (`pack_quantized`, `mxfp4`, ...).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.exports.compare import Checked, compare
from aqtx.checkpoint.exports.target import Job, Target
from aqtx.checkpoint.packed.compressed import compressed_folder, packed_name
from aqtx.checkpoint.shards import write_shards
from aqtx.checkpoint.write import copy_tokenizer
from aqtx.formats import QuantizedTensor
from aqtx.formats.packing import to_disk_order
from aqtx.formats.table import BF16_SCALE, E8M0, NVFP4_SCALE, Format
from aqtx.models.config_text import config_text
from aqtx.models.on_disk import ALWAYS_FUSED

_MX = {"e2m1": "mxfp4-pack-quantized", "e2m3": "mxfp6-pack-quantized", "e4m3": "mxfp8-quantized"}
_ROUNDED_INPUTS = {  # (form, activation) -> form and `input_activations`, where the two go together
    ("pack-quantized", "int8_row"): ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "token"}),
    ("float-quantized", "fp8_e4m3_row"): ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "token"}),
    ("mxfp8-quantized", "mxfp8_e4m3"): (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    ("mxfp4-pack-quantized", "mxfp4"): (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}


def form(fmt: Format, num_columns: int) -> str | None:
    """The compressor's name for a format on rows of so many weights; only whole blocks have one.

    A row shorter than its group has one scale, and is told as a whole row.
    """
    if num_columns % fmt.block_size(num_columns) or fmt.scale.code_bits:
        return None
    if fmt.scale is E8M0:
        return _MX.get(fmt.element.name)
    if fmt.scale is NVFP4_SCALE:
        return "nvfp4-pack-quantized"
    if fmt.element.is_float:
        whole_rows = fmt.element.name == "e4m3" and fmt.block_size(num_columns) == num_columns
        return "float-quantized" if whole_rows else None
    return "pack-quantized"


def _with_input(fmt: Format, num_columns: int, activation: str | None) -> tuple[str, dict[str, Any] | None]:
    """The form of a weight, and what rounds its input; None where the two have no form together."""
    kind = form(fmt, num_columns)
    assert kind is not None  # refused before
    is_row_int8 = fmt.element.name == "int8" and not fmt.asymmetric and fmt.block_size(num_columns) == num_columns
    if activation is None or (kind == "pack-quantized" and not is_row_int8):
        return kind, None
    made = _ROUNDED_INPUTS.get((kind, activation.partition("@")[0]))
    return (kind, None) if made is None else (made[0], {"symmetric": True, "dynamic": True, **made[1]})


def _scheme(fmt: Format, num_columns: int, activation: str | None) -> dict[str, Any]:
    """The entry of `config_groups` that tells how to read one format, without its targets."""
    kind, inputs = _with_input(fmt, num_columns, activation)
    weights: dict[str, Any] = {
        "num_bits": fmt.element.bits,
        "type": "float" if fmt.element.is_float else "int",
        "symmetric": not fmt.asymmetric,
        "dynamic": False,
        "strategy": "channel",
    }
    # a row of exactly one group stays a group: vLLM wants one scheme of all matrices of an expert, whatever their rows
    is_row = fmt.block_size(num_columns) == num_columns and not (kind == "pack-quantized" and fmt.block == num_columns)
    if fmt.scale is BF16_SCALE and is_row:
        return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": kind}
    weights |= {"strategy": "group", "group_size": fmt.block_size(num_columns)}
    if fmt.scale is E8M0:
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if fmt.scale is NVFP4_SCALE:
        dtype = "torch.float8_e4m3fn"
        weights |= {"strategy": "tensor_group", "scale_dtype": dtype, "zp_dtype": dtype}
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": kind}


def matrix_tensors(key: str, value: QuantizedTensor, activation: str | None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of one quantized matrix [N, K]; `key` ends in `.weight`."""
    fmt, parts = value.format, value.to_disk()
    codes, scale = parts["qdata"], parts["scale"]
    kind, _ = _with_input(fmt, value.num_columns, activation)
    if kind in ("float-quantized", "mxfp8-quantized"):
        yield key, codes.view(torch.float8_e4m3fn)
    elif kind == "int-quantized":
        yield key, (codes ^ 0x80).view(torch.int8)  # from offset binary to two's complement
    elif kind == "pack-quantized":
        yield packed_name(key), _words(codes)
        yield f"{key}_shape", torch.tensor(value.shape)
    else:
        yield packed_name(key), codes
    yield f"{key}_scale", scale.view(torch.float8_e4m3fn) if fmt.scale is NVFP4_SCALE else scale
    if "zero_point" in parts:
        along_rows = to_disk_order(parts["zero_point"].t().contiguous(), fmt.element.bits)
        yield f"{key}_zero_point", _words(along_rows).t().contiguous()
    if "per_tensor_scale" in parts:
        yield f"{key}_global_scale", parts["per_tensor_scale"].double().reciprocal().float().reshape(1)


def _words(rows: Tensor) -> Tensor:
    """Bytes [N, B] as int32 [N, ceil(B / 4)], the last word of a row filled with zeros."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 4)).contiguous().view(torch.int32)


def quantization_config(job: Job) -> dict[str, Any]:
    """What config.json tells the loaders: a group of targets per scheme, and every linear that has none."""
    sites, activations = job.sites, job.activations()
    schemes: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = defaultdict(list)
    for name, fmt in job.formats.items():
        scheme = _scheme(fmt, sites[name].shape[1], activations.get(name))
        schemes[json.dumps(scheme)] = scheme
        members[json.dumps(scheme)].append(name)
    groups = {
        f"group_{i}": {"targets": _targets(names), **schemes[key]} for i, (key, names) in enumerate(members.items())
    }
    kinds = {scheme["format"] for scheme in schemes.values()}
    heads = [name.removesuffix(".weight") for name in job.program.weights.tied]
    plain = [name for name in [*sites, *heads] if name not in job.formats]
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": _targets(list(dict.fromkeys(plain))),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(names: list[str]) -> list[str]:
    """Module names as the loaders match them: one expression per role, which lists its layers (and any expert)."""
    roles: dict[tuple[str, str], list[int]] = defaultdict(list)
    single = []
    for name in names:
        found = re.match(r"(.*\.layers\.)(\d+)\.(.*)", name)
        if not found:
            single.append(name)
            continue
        layers = roles[found[1], re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.#.", found[3])]
        if int(found[2]) not in layers:
            layers.append(int(found[2]))
    expressions = [
        f"re:{re.escape(before)}({'|'.join(map(str, layers))})\\.{re.escape(role).replace(re.escape('#'), '[0-9]+')}$"
        for (before, role), layers in roles.items()
    ]
    return [*expressions, *single]


def refuses(config: Mapping[str, Any]) -> list[str]:
    """Families of which no program loads single experts, quantized or not."""
    kind = config.get("model_type")
    if kind not in ALWAYS_FUSED:
        return []
    return [
        f"vLLM and transformers load the experts of {kind} in one tensor a layer, for which compressed-tensors has "
        "no form: use the checkpoint itself in transformers, or --to dequantized"
    ]


def check(job: Job) -> list[str]:
    """The same, and checkpoints without a code."""
    if problems := refuses(job.program.config):
        return problems
    if not job.formats:
        return ["nothing in the checkpoint is quantized, so there are no codes to write: export `--to dequantized`"]
    return []


def tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Everything that the folder stores, one matrix in memory at a time."""
    activations = job.activations()
    for key, value in job.plain():
        yield key, value.to(job.dtype_of(key)) if value.dtype == torch.float64 else value
    for name in job.formats:
        stored = job.program.stored(job.sites[name])
        assert isinstance(stored, QuantizedTensor)
        yield from matrix_tensors(f"{name}.weight", stored, activations.get(name))


def write(job: Job) -> list[str]:
    """The folder, and a sentence for inputs whose rounding has no form."""
    program, activations, sites = job.program, job.activations(), job.sites
    job.output.mkdir(parents=True, exist_ok=True)
    write_shards(tensors(job), job.output)
    config = {key: value for key, value in program.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(program.dtype).removeprefix("torch.")
    if program.weights.tied and not program.tied():
        config["tie_word_embeddings"] = False
    if job.formats:
        config["quantization_config"] = quantization_config(job)
    (job.output / "config.json").write_text(config_text(config))
    if program.folder is not None:
        copy_tokenizer(program.folder, job.output)
    lost = [
        name
        for name, activation in activations.items()
        if name not in job.formats or _with_input(job.formats[name], sites[name].shape[1], activation)[1] is None
    ]
    if not lost:
        return []
    told = f"inputs of {len(lost)} matrices were rounded ({activations[lost[0]]}) as the model ran"
    return [f"{told}; compressed-tensors has no form for that with these weights, and inputs stay as they are"]


def verify(job: Job) -> Checked:
    """Decode the folder and compare every value and name with the program's."""
    reader, checked = compressed_folder(job.output), Checked()
    for key, value in job.plain():
        compare(checked, key, reader.get(key), value.to(job.dtype_of(key)) if value.dtype == torch.float64 else value)
    for name in job.formats:
        own, key = job.program.stored(job.sites[name]), f"{name}.weight"
        assert isinstance(own, QuantizedTensor)
        values = own.dequantize(torch.float32)
        # the inverse of NVFP4's outer scale is rounded, and so is what is divided by it: two units in the last place
        compare(
            checked,
            key,
            reader.decode(key),
            values,
            2.0**-22 * values.abs() if own.per_tensor_scale is not None else 0.0,
        )
    checked.complete(reader.entries)
    return checked


TARGET = Target(
    name="compressed-tensors",
    summary="codes and scales as vLLM and transformers load them",
    suffix="-compressed-tensors",
    form=form,
    write=write,
    verify=verify,
    check=check,
    refuses=refuses,
)
