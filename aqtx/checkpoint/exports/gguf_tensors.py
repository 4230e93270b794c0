"""The tensors of a GGUF file: names, types and shapes, and the data of one at a time."""

from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize as as_type
from torch import Tensor

from aqtx.checkpoint.exports.gguf_metadata import family_of, names_of, parsed
from aqtx.checkpoint.exports.gguf_parts import Part, flat
from aqtx.checkpoint.exports.gguf_rules import parts_of
from aqtx.checkpoint.exports.gguf_types import encode, kind_of, too_large
from aqtx.checkpoint.exports.target import Job, plain_matrix
from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor
from aqtx.models.rotary import Rope
from aqtx.program.edits import by_weight, in_force
from aqtx.program.names import is_stacked

_PLAIN = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_IN_FLOAT32 = ("ffn_gate_inp", "_norm.weight", ".bias", "rope_freqs", "ssm_conv1d")  # as llama.cpp's own converter


class Entry(NamedTuple):
    """A tensor of the file: its name, the keys on disk that it holds, and what of them in which order."""

    name: str
    keys: list[str]
    stacked: bool
    part: Part
    kind: Kind
    shape: tuple[int, ...]


def entries(job: Job) -> list[Entry]:
    """All tensors of the file in the model's order.

    Raises:
        InputError: the architecture in llama.cpp has no place for one of the model's parameters.
    """
    program, config = job.program, job.program.config
    family = family_of(config, job.template)
    names = names_of(family.arch, config["num_hidden_layers"])
    made, sites, lost = [], program.sites_by_weight(), []
    for parameter, spec in program.weights.specs.items():
        if parameter in program.tied():
            continue
        stacked = is_stacked(parameter, spec.shape)
        keys = list(dict.fromkeys(f"{site.name}.weight" for site in sites.get(parameter, []))) or [parameter]
        for part in parts_of(family.rules, config, parameter):
            found = names.get_name(part.asked)
            if found is None:
                lost.append(parameter)
                continue
            name, shape = f"{found}{part.suffix}", part.shape(flat(spec.shape, stacked))
            kind = _kind(job, keys, part, name, shape)
            made.append(Entry(name, keys, stacked, part, kind, shape))
    if lost:
        raise InputError(f"llama.cpp's {family.arch} has no place for {lost[0]} ({len(lost)} such parameters)")
    return made


def _kind(job: Job, keys: list[str], part: Part, name: str, shape: tuple[int, ...]) -> Kind:
    """The type of a tensor's codes or plain values; values that codes mean are whole in float32 alone."""
    first = keys[0].removesuffix(".weight")
    if first in job.formats:
        kind = kind_of(job.formats[first], shape[-1])
        return Kind.F32 if part.turned or kind is None else kind
    if len(shape) == 1 or part.change is not None or any(piece in name for piece in _IN_FLOAT32):
        return Kind.F32
    return _PLAIN.get(job.dtype_of(keys[0]), Kind.F32)


def outer_scales(job: Job, tensors: list[Entry]) -> dict[str, np.ndarray]:
    """NVFP4's scales per matrix, as tensors beside their weights."""
    made = {}
    for entry in tensors:
        if entry.kind is Kind.NVFP4:
            value = job.program.stored(job.sites[entry.keys[0].removesuffix(".weight")])
            assert isinstance(value, QuantizedTensor) and value.per_tensor_scale is not None
            made[entry.name.replace(".weight", ".scale")] = value.per_tensor_scale.reshape(1).numpy()
    return made


def rope_factors(job: Job) -> dict[str, np.ndarray]:
    """Llama 3's rotary variant is a divisor per frequency in llama.cpp."""
    if job.template is not None:
        return {}
    decoder = parsed(job.program.config).decoder
    if decoder.rope.kind != "llama3":
        return {}
    plain = Rope(theta=decoder.rope.theta).frequencies(decoder.rotary_size)
    return {"rope_freqs.weight": (plain / decoder.rope.frequencies(decoder.rotary_size)).float().numpy()}


def data_of(job: Job, entry: Entry) -> tuple[np.ndarray, int]:
    """A tensor's bytes or values, and how many of its scales were rounded."""
    made = [_matrix(job, entry, key) for key in entry.keys]
    data = np.stack([rows for rows, _ in made]) if entry.stacked else made[0][0]
    return np.ascontiguousarray(data), sum(rounded for _, rounded in made)


def _matrix(job: Job, entry: Entry, key: str) -> tuple[np.ndarray, int]:
    """One matrix or vector of a tensor, and how many of its scales were rounded."""
    name = key.removesuffix(".weight")
    if name not in job.formats or entry.part.turned:
        values = entry.part.laid_out(value_of(job, key).float().numpy())
        return (values if entry.kind is Kind.F32 else as_type(values, entry.kind)), 0
    stored = job.program.stored(job.sites[name])
    assert isinstance(stored, QuantizedTensor)
    if too_large(stored):
        raise InputError(f"{name}: a scale exceeds {65504}, the largest of half precision, which GGUF stores")
    encoded = encode(stored)
    return entry.part.laid_out(encoded.rows), encoded.rounded


def value_of(job: Job, key: str) -> Tensor:
    """A parameter's values; a rotation before it is undone."""
    name = key.removesuffix(".weight")
    if name not in job.sites:
        value = job.program.weights.on_disk(key)
    else:
        site = job.sites[name]
        value = plain_matrix(job.program, site, in_force(by_weight(job.program.edits).get(site.weight, [])))
    return value.reshape(flat(tuple(value.shape), stacked=False))
