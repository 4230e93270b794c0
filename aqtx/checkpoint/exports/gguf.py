"""GGUF: what llama.cpp and its relatives load, in one file. Codes are kept; types by `gguf_types`.

One tensor of the file is in memory at a time: a matrix, or the experts of one layer and projection, which llama.cpp
stacks and therefore wants in one type.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from aqtx.checkpoint.exports.compare import Checked, compare
from aqtx.checkpoint.exports.gguf_families import FAMILIES
from aqtx.checkpoint.exports.gguf_metadata import (
    add_metadata,
    config_problems,
    copy_metadata,
    family_of,
    missing,
    parsed,
    template_problems,
)
from aqtx.checkpoint.exports.gguf_reader import GgufReader
from aqtx.checkpoint.exports.gguf_tensors import Entry, data_of, entries, outer_scales, rope_factors, value_of
from aqtx.checkpoint.exports.gguf_tokenizer import tokenizer_notes
from aqtx.checkpoint.exports.gguf_types import kind_of
from aqtx.checkpoint.exports.target import Job, Target
from aqtx.formats import QuantizedTensor
from aqtx.formats.table import Format


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
    config = job.program.config
    return [*config_problems(config), *missing(config, job.program.folder)]


def write(job: Job) -> list[str]:
    """The file, and what a user should know of it."""
    program, family = job.program, family_of(job.program.config, job.template)
    writer = GGUFWriter(None, family.arch)
    if job.template is not None:
        copy_metadata(writer, job.template, _plain_config(job), program.folder)
    else:
        assert program.folder is not None  # `check` found its tokenizer
        add_metadata(writer, _plain_config(job), program.folder, job.name)
    tensors, factors = entries(job), rope_factors(job)
    outer = outer_scales(job, tensors)
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
        data, inexact = data_of(job, entry)
        rounded += inexact
        writer.write_tensor_data(data)
    for value in {**outer, **factors}.values():
        writer.write_tensor_data(value)
    writer.close()
    return _notes(job, tensors, rounded)


def _notes(job: Job, tensors: list[Entry], rounded: int) -> list[str]:
    told, program = [], job.program
    if rounded:
        told.append(f"{rounded:,} scales or minima have no exact half-precision value and were rounded to the nearest")
    if job.activations():
        told.append("llama.cpp rounds inputs in its own way; the plan's activation formats are left out")
    window = program.config.get("sliding_window")
    family = family_of(program.config, job.template)
    if window and family.arch == "llama":
        told.append(f"llama.cpp's llama has no sliding window: beyond {window} tokens it attends to all")
    turned = [
        entry.keys[0] for entry in tensors if entry.part.turned and entry.keys[0].removesuffix(".weight") in job.formats
    ]
    if turned:
        told.append(
            f"llama.cpp wants {len(turned)} matrices turned, first {turned[0]}, so that a part of each is in float32"
        )
    if program.config.get("model_type") in FAMILIES:
        told += family.notes(parsed(program.config))
    if job.template is None and program.folder is not None:
        told += tokenizer_notes(program.folder)
    return told


def _plain_config(job: Job) -> dict[str, object]:
    """The config without this project's quantization, and untied where the head is a tensor of its own."""
    program = job.program
    config = {key: value for key, value in program.config.items() if key != "quantization_config"}
    if program.weights.tied and not program.tied():
        config["tie_word_embeddings"] = False
    return config


def verify(job: Job) -> Checked:
    """Decode the file and compare every value and name with the program's."""
    reader, checked, tensors = GgufReader(job.output), Checked(), entries(job)
    held: dict[tuple[str, ...], list[Entry]] = {}
    for entry in tensors:
        held.setdefault(tuple(entry.keys), []).append(entry)
    for keys, parts in held.items():
        for index, key in enumerate(keys):
            name = key.removesuffix(".weight")
            stored = job.program.stored(job.sites[name]) if name in job.formats else None
            own = stored.dequantize(torch.float32) if isinstance(stored, QuantizedTensor) else value_of(job, key)
            places = [(entry.name, entry.part) for entry in parts]
            written = reader.parameter(places, tuple(own.shape), index if parts[0].stacked else None)
            if isinstance(stored, QuantizedTensor):
                compare(checked, key, written, own, _half_step(stored))
            else:
                own = own.to(job.dtype_of(key)) if own.dtype == torch.float64 else own
                compare(checked, key, written, own, _changed(own) if parts[0].part.change else 0.0)
    names = {entry.name for entry in tensors} | outer_scales(job, tensors).keys() | rope_factors(job).keys()
    checked.problems += [f"{name} is missing" for name in sorted(names - reader.tensors.keys())]
    checked.problems += [f"{name} is one too many" for name in sorted(reader.tensors.keys() - names)]
    return checked


def _changed(own: Tensor) -> Tensor:
    """How far a value may be from its own after it was changed there and back: 1 + x and exp x in float32."""
    return 2.0**-22 * (1 + own.double().abs())


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
    refuses=config_problems,
    missing=missing,
)
