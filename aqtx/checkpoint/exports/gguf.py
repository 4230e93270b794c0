"""GGUF: what llama.cpp and its relatives load, in one file. Codes are kept; types by `gguf_types`.

One tensor of the file is in memory at a time: a matrix, or the experts of one layer and projection, which llama.cpp
stacks and therefore wants in one type.
"""

from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize as as_type
from torch import Tensor

from aqtx.checkpoint.exports.compare import Checked, compare
from aqtx.checkpoint.exports.gguf_metadata import (
    add_metadata,
    config_problems,
    copy_metadata,
    family_of,
    names_of,
    template_problems,
)
from aqtx.checkpoint.exports.gguf_reader import GgufReader, rows_in_order
from aqtx.checkpoint.exports.gguf_tokenizer import tokenizer_problems
from aqtx.checkpoint.exports.gguf_types import Bytes, Encoded, encode, kind_of, too_large
from aqtx.checkpoint.exports.target import Job, Target, plain_matrix
from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor
from aqtx.formats.table import Format
from aqtx.models.rotary import Rope
from aqtx.program.edits import by_weight, in_force

_PLAIN = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_IN_FLOAT32 = ("ffn_gate_inp", "_norm.weight", ".bias", "rope_freqs")  # as llama.cpp's own converter keeps them


class Entry(NamedTuple):
    """A tensor of the file: its name, the keys on disk that it holds, and how their rows are ordered."""

    name: str
    keys: list[str]
    stacked: bool
    heads: int  # q or k of so many heads with rows in llama.cpp's order; 0 for any other tensor
    kind: Kind
    shape: tuple[int, ...]


def form(fmt: Format, num_columns: int) -> str | None:
    """The name of the type that keeps a format."""
    kind = kind_of(fmt, num_columns)
    return None if kind is None else kind.name


def bits(fmt: Format, num_columns: int) -> float:
    """Bits per weight of the type that keeps a format; 0 where none does."""
    kind = kind_of(fmt, num_columns)
    size, num_bytes = GGML_QUANT_SIZES[kind] if kind is not None else (1, 0)
    return num_bytes * 8 / size


def check(job: Job) -> list[str]:
    """What llama.cpp would not compute or could not be told."""
    if job.template is not None:
        return template_problems(job.program.config, job.template)
    return [*config_problems(job.program.config), *tokenizer_problems(job.program.folder)]


def entries(job: Job) -> list[Entry]:
    """All tensors of the file in the model's order.

    Raises:
        InputError: the architecture in llama.cpp has no place for one of the model's parameters.
    """
    program, config = job.program, job.program.config
    family = family_of(config, job.template)
    names = names_of(family.arch, config["num_hidden_layers"])
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads") or heads["attn_q"]
    made, sites, lost = [], program.sites_by_weight(), []
    for parameter, spec in program.weights.specs.items():
        if parameter in program.tied():
            continue
        stacked = ".experts." in parameter and len(spec.shape) == 3
        suffix = "" if stacked else "." + parameter.rpartition(".")[2]
        found = names.get_name(parameter.removesuffix(suffix) if suffix else parameter)
        if found is None:
            lost.append(parameter)
            continue
        keys = [f"{site.name}.weight" for site in sites.get(parameter, [])] or [parameter]
        name = f"{found}{suffix or '.weight'}"
        role = name.split(".")[-2]
        order = heads.get(role, 0) if family.permuted else 0
        shape = spec.shape[1:] if len(spec.shape) == 2 and spec.shape[0] == 1 else spec.shape
        made.append(Entry(name, list(dict.fromkeys(keys)), stacked, order, _kind(job, name, keys, spec.shape), shape))
    if lost:
        raise InputError(f"llama.cpp's {family.arch} has no place for {lost[0]} ({len(lost)} such parameters)")
    return made


def _kind(job: Job, name: str, keys: list[str], shape: tuple[int, ...]) -> Kind:
    """The type of a tensor's codes or plain values."""
    first = keys[0].removesuffix(".weight")
    if first in job.formats:
        kind = kind_of(job.formats[first], shape[-1])
        assert kind is not None
        return kind
    if len(shape) == 1 or any(part in name for part in _IN_FLOAT32):
        return Kind.F32
    return _PLAIN.get(job.dtype_of(keys[0]), Kind.F32)


def write(job: Job) -> list[str]:
    """The file, and what a user should know of it."""
    program, family = job.program, family_of(job.program.config, job.template)
    writer = GGUFWriter(None, family.arch)
    if job.template is not None:
        copy_metadata(writer, job.template, _plain_config(job), program.folder)
    else:
        assert program.folder is not None  # `check` found its tokenizer
        add_metadata(writer, _plain_config(job), program.folder, job.name)
    tensors, factors = entries(job), _rope_factors(job)
    outer = _outer_scales(job, tensors)
    for entry in tensors:
        shape = quant_shape_to_byte_shape(entry.shape, entry.kind) if entry.kind.value > 1 else entry.shape
        dtype = np.dtype(np.uint8 if entry.kind.value > 1 else np.float16 if entry.kind is Kind.F16 else np.float32)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(entry.name, shape, dtype, size, entry.kind)
    for name, value in {**outer, **factors}.items():
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes, Kind.F32)
    writer.write_header_to_file(job.output)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rounded = 0
    for entry in tensors:
        data, inexact = _data(job, entry)
        rounded += inexact
        writer.write_tensor_data(data)
    for value in {**outer, **factors}.values():
        writer.write_tensor_data(value)
    writer.close()
    return _notes(job, rounded)


def _notes(job: Job, rounded: int) -> list[str]:
    told = []
    if rounded:
        told.append(f"{rounded:,} scales or minima have no exact half-precision value and were rounded to the nearest")
    if job.activations():
        told.append("llama.cpp rounds inputs in its own way; the plan's activation formats are left out")
    window = job.program.config.get("sliding_window")
    if window and family_of(job.program.config, job.template).arch == "llama":
        told.append(f"llama.cpp's llama has no sliding window: beyond {window} tokens it attends to all")
    return told


def _plain_config(job: Job) -> dict[str, object]:
    """The config without this project's quantization, and untied where the head is a tensor of its own."""
    program = job.program
    config = {key: value for key, value in program.config.items() if key != "quantization_config"}
    if program.weights.tied and not program.tied():
        config["tie_word_embeddings"] = False
    return config


def _outer_scales(job: Job, tensors: list[Entry]) -> dict[str, np.ndarray]:
    """NVFP4's scales per matrix, as tensors beside their weights."""
    made = {}
    for entry in tensors:
        if entry.kind is Kind.NVFP4:
            value = job.program.stored(job.sites[entry.keys[0].removesuffix(".weight")])
            assert isinstance(value, QuantizedTensor) and value.per_tensor_scale is not None
            made[entry.name.replace(".weight", ".scale")] = value.per_tensor_scale.reshape(1).numpy()
    return made


def _rope_factors(job: Job) -> dict[str, np.ndarray]:
    """Llama 3's rotary variant is a divisor per frequency in llama.cpp."""
    config = job.program.config
    if job.template is not None or Rope.kind_of(config) != "llama3":
        return {}
    rope = Rope.from_dict(config)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    plain = Rope(theta=rope.theta).frequencies(head)
    return {"rope_freqs.weight": (plain / rope.frequencies(head)).float().numpy()}


def _data(job: Job, entry: Entry) -> tuple[np.ndarray, int]:
    """A tensor's bytes or values, and how many of its scales were rounded."""
    made = [_matrix(job, entry, key) for key in entry.keys]
    rows = [rows_in_order(part.rows, entry.heads) for part in made]
    data = np.stack(rows) if entry.stacked else rows[0]
    return np.ascontiguousarray(data), sum(part.rounded for part in made)


def _matrix(job: Job, entry: Entry, key: str) -> Encoded:
    """One matrix or vector of a tensor."""
    name = key.removesuffix(".weight")
    if name in job.formats:
        stored = job.program.stored(job.sites[name])
        assert isinstance(stored, QuantizedTensor)
        if too_large(stored):
            raise InputError(f"{name}: a scale exceeds {65504}, the largest of half precision, which GGUF stores")
        return encode(stored)
    return Encoded(_plain(_value(job, key), entry.kind), entry.kind, None, 0)


def _value(job: Job, key: str) -> Tensor:
    """An unquantized parameter; a rotation before it is undone."""
    name = key.removesuffix(".weight")
    if name not in job.sites:
        return job.program.weights.on_disk(key)
    site = job.sites[name]
    value = plain_matrix(job.program, site, in_force(by_weight(job.program.edits).get(site.weight, [])))
    return value.squeeze(0) if value.dim() == 2 and value.shape[0] == 1 else value


def _plain(value: Tensor, kind: Kind) -> Bytes:
    values = value.float().numpy()
    return values if kind is Kind.F32 else as_type(values, kind)


def verify(job: Job) -> Checked:
    """Decode the file and compare every value and name with the program's."""
    reader, checked, tensors = GgufReader(job.output), Checked(), entries(job)
    for entry in tensors:
        for index, key in enumerate(entry.keys):
            written = reader.decode(entry.name, index if entry.stacked else None, entry.heads)
            name = key.removesuffix(".weight")
            if name not in job.formats:
                own = _value(job, key)
                compare(checked, key, written, own.to(job.dtype_of(key)) if own.dtype == torch.float64 else own)
                continue
            stored = job.program.stored(job.sites[name])
            assert isinstance(stored, QuantizedTensor)
            compare(checked, key, written, stored.dequantize(torch.float32), _half_step(stored))
    names = {entry.name for entry in tensors} | _outer_scales(job, tensors).keys() | _rope_factors(job).keys()
    checked.problems += [f"{name} is missing" for name in sorted(names - reader.tensors.keys())]
    checked.problems += [f"{name} is one too many" for name in sorted(reader.tensors.keys() - names)]
    return checked


def _half_step(value: QuantizedTensor) -> Tensor | float:
    """How far a value may be from its own: its scale and minimum rounded to half precision's 11 bits or 2^-24.

    Half a unit in the last place of s q + m is at most 2^-12 (|s q| + |m|) (each part's own rounding, taken double for
    float32 sums), and 2^-25 (q + 1) where half precision is subnormal. NVFP4's and MXFP4's scales are exact.
    """
    fmt = value.format
    if fmt.scale.code_bits:
        return 0.0
    if kind_of(fmt, value.num_columns) in (Kind.MXFP4, Kind.NVFP4):
        return (
            2.0**-22 * value.dequantize(torch.float32).abs() if kind_of(fmt, value.num_columns) is Kind.NVFP4 else 0.0
        )
    levels = 2.0**fmt.element.bits
    scale = value.scales.scale.float().abs().amax(-1, keepdim=True)
    return 2.0**-11 * scale * levels * float(fmt.asymmetric) + 2.0**-25 * levels


TARGET = Target(
    name="gguf",
    summary="one file for llama.cpp",
    suffix=".gguf",
    form=form,
    write=write,
    verify=verify,
    is_file=True,
    check=check,
    bits=bits,
)
