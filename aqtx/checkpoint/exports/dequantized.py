"""Plain weights that any tool loads.

A rotation that runs before a linear is undone in its weight, x Q W^T = x (W Q^T)^T, so that no tool
needs to know of it. Quantized activations have no plain form: they are left out, and told.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.exports.compare import Checked, compare
from aqtx.checkpoint.exports.target import Job, Target
from aqtx.checkpoint.huggingface.skeleton import canonical_tensors
from aqtx.checkpoint.published_names import as_published
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.checkpoint.shards import write_shards
from aqtx.checkpoint.write import copy_tokenizer
from aqtx.formats.table import Format
from aqtx.models import supported
from aqtx.models.config_text import config_text
from aqtx.program.names import NamesTable


def form(fmt: Format, num_columns: int) -> str:
    """Every format has plain values."""
    return "plain"


def write(job: Job) -> list[str]:
    """A folder with every weight dequantized and rounded once to the job's dtype."""
    program = job.program
    job.output.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in program.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(job.dtype).removeprefix("torch.")
    if supported(config):
        write_shards(as_published(config, _tensors(job)), job.output)
        (job.output / "config.json").write_text(config_text(config))
    else:
        _write_foreign(dict(_tensors(job)), config, job)
    if program.folder is not None:
        copy_tokenizer(program.folder, job.output)
    count = len(job.activations())
    told = f"inputs of {count} matrices were rounded as the model ran; plain weights leave that out"
    return [told] if count else []


def _tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """What the folder stores; what is more precise than the model's dtype, such as a router, stays so."""
    for key, value in job.plain(skip_codes=False):
        own = job.dtype_of(key)
        yield key, value.to(own if own != job.program.dtype else job.dtype)


def verify(job: Job) -> Checked:
    """Read the folder back; names and values must be those that were meant.

    A model that only transformers knows has fused weights there, which transformers itself wrote.
    """
    checked = Checked()
    if not supported(job.program.config):
        return checked
    reader = CheckpointReader(job.output)
    for key, value in as_published(job.program.config, _tensors(job)):
        compare(checked, key, reader.get(key), value)
    checked.complete(reader.entries)
    return checked


def _write_foreign(tensors: dict[str, Tensor], config: dict[str, Any], job: Job) -> None:
    """Through transformers' own model, which knows the names and the fusing of its checkpoints."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model: Any = AutoModelForCausalLM.from_config(made, dtype=job.dtype)
    table = NamesTable({name: tuple(place.shape) for name, place in canonical_tensors(model).items()})
    _widen(model, {table.from_disk[key][0]: tensor.dtype for key, tensor in tensors.items()}, job.dtype)
    places = canonical_tensors(model)  # views: what is copied into them lands in the fused parameters
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, expert = table.from_disk[key]
            (places[name] if expert is None else places[name][expert]).copy_(tensor)
    model.save_pretrained(job.output)


def _widen(model: nn.Module, dtypes: dict[str, torch.dtype], usual: torch.dtype) -> None:
    """Give parameters that are more precise than the rest their dtype; fused ones if any of their parts is."""
    precise = {name: dtype for name, dtype in dtypes.items() if dtype != usual}
    owners = {name.rpartition(".")[0]: dtype for name, dtype in precise.items() if name not in model.state_dict()}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        dtype = precise.get(name) or (owners.get(name.rpartition(".")[0]) if name not in dtypes else None)
        if dtype is not None:
            value.data = value.data.to(dtype)


TARGET = Target(
    name="dequantized",
    summary="plain weights without any codes, for any program",
    suffix="-dequantized",
    form=form,
    write=write,
    verify=verify,
    keeps_codes=False,
)
