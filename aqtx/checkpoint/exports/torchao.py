"""torchao's own tensors, in the safetensors form that its helpers load: for GPUs with kernels for them.

`<name>._weight_qdata` and so on are the parts of a tensor; how they go together stands as JSON in the file's header.
`torchao.prototype.safetensors.safetensors_support.unflatten_tensor_state_dict` puts them together again.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from aqtx.checkpoint.exports.compare import Checked, compare
from aqtx.checkpoint.exports.target import Job, Target
from aqtx.checkpoint.shards import write_shards
from aqtx.checkpoint.write import copy_tokenizer
from aqtx.formats import QuantizedTensor
from aqtx.formats.table import Format
from aqtx.formats.torchao_base import import_quietly
from aqtx.formats.torchao_convert import class_of, rounds_inputs, to_torchao, values_of
from aqtx.models.config_text import config_text

INDEX = "model.safetensors.index.json"


def form(fmt: Format, num_columns: int) -> str | None:
    """The name of torchao's class."""
    return class_of(fmt, num_columns)


def _support() -> Any:
    return import_quietly("torchao.prototype.safetensors.safetensors_support")


def _tensors(job: Job, metadata: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Parts of each tensor; fills `metadata` on the way."""
    names, activations = [], job.activations()

    def flat(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        parts, told = _support().flatten_tensor_state_dict({key: value})
        metadata.update({name: text for name, text in told.items() if name != "tensor_names"})
        names.append(key)
        yield from parts.items()

    for key, value in job.plain():
        plain = value.to(job.dtype_of(key)) if value.dtype == torch.float64 else value
        yield from flat(key, plain.detach().as_subclass(Tensor))
    for name in job.formats:
        stored = job.program.stored(job.sites[name])
        assert isinstance(stored, QuantizedTensor)
        yield from flat(f"{name}.weight", to_torchao(stored, activations.get(name)))
    metadata["tensor_names"] = json.dumps(names)


def write(job: Job) -> list[str]:
    """A folder of shards, whose headers tell of all tensors."""
    job.output.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, str] = {}
    write_shards(_tensors(job, metadata), job.output, metadata)
    config = {key: value for key, value in job.program.config.items() if key != "quantization_config"}
    (job.output / "config.json").write_text(config_text(config))
    if job.program.folder is not None:
        copy_tokenizer(job.program.folder, job.output)
    told = []
    inputs = job.activations().items()
    lost = [name for name, how in inputs if name not in job.formats or not rounds_inputs(job.formats[name], how)]
    if lost:
        told.append(f"inputs of {len(lost)} matrices were rounded as the model ran; that is left out")
    if count := sum(json.loads(text).get("_type") == "Int4Tensor" for text in metadata.values() if text[:1] == "{"):
        told.append(f"{count} matrices are torchao's Int4Tensor, which computes on a GPU with the package mslk only")
    return told


def load(folder: Any) -> dict[str, Tensor]:
    """All tensors of an exported folder by name, torchao's where a weight is quantized."""
    parts: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            parts |= {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (it is no mapping)
            metadata |= stream.metadata()
    made: dict[str, Tensor]
    made, left = _support().unflatten_tensor_state_dict(parts, metadata)
    return made | left


def verify(job: Job) -> Checked:
    """Load the folder by torchao's own helpers and compare every value and name."""
    checked, theirs = Checked(), load(job.output)
    for key, value in job.plain():
        own = value.to(job.dtype_of(key)) if value.dtype == torch.float64 else value
        compare(checked, key, theirs[key], own)
    for name in job.formats:
        key, stored = f"{name}.weight", job.program.stored(job.sites[name])
        assert isinstance(stored, QuantizedTensor)
        compare(checked, key, values_of(theirs[key]), stored.dequantize())
    checked.complete(theirs)
    return checked


TARGET = Target(
    name="torchao",
    summary="torchao's own tensors",
    suffix="-torchao",
    form=form,
    write=write,
    verify=verify,
)
