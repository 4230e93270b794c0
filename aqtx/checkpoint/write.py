"""The quantized checkpoint: a normal Hugging Face folder plus what a quantized model needs.

Tensors of a quantized site are `<site>.weight.qdata|scale|zero_point`; the formats by site and the
structural edits stand in config.json under `quantization_config`. Loading traces the config's
model on meta, replays the edits and reads the weights lazily: bit-exact, and no pickle anywhere.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aqtx.checkpoint.shards import write_shards
from aqtx.checkpoint.source import LAYOUT_VERSION
from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor
from aqtx.program.program import Program

if TYPE_CHECKING:
    pass

_PASSED_ON = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("generation_config.json", "chat_template*"),
)


def save(program: Program, directory: str | Path) -> Path:
    """Write the program as a checkpoint folder; it must not exist or be empty.

    The folder appears under its name only when it is complete.
    """
    directory = Path(directory)
    if directory.is_file():
        raise InputError(f"{directory} is a file; name a folder")
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory}: the folder is not empty; name another one")
    staging = directory.with_name(directory.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    write_model(program, staging)
    if directory.exists():
        directory.rmdir()
    staging.rename(directory)
    return directory


def write_model(program: Program, directory: Path) -> None:
    """Weights, config, plan and tokenizer files of a program, written into `directory`."""
    if len(program.codes) and not program.emitted:
        raise InputError("the program holds codes that were not emitted: add `emit` as the last pass before saving")
    directory.mkdir(parents=True, exist_ok=True)
    formats: dict[str, str] = {}
    write_shards(disk_tensors(program, formats), directory)
    (directory / "config.json").write_text(json.dumps(config_of(program, formats), indent=2) + "\n")
    if program.plan is not None:
        (directory / "plan.json").write_text(json.dumps(program.plan.to_json(), indent=1) + "\n")
    if program.folder is not None:
        copy_tokenizer(program.folder, directory)


def copy_tokenizer(folder: Path, directory: Path) -> None:
    """Copy what belongs to a model beside its weights and config."""
    for pattern in _PASSED_ON:
        for file in sorted(folder.glob(pattern)):
            shutil.copyfile(file, directory / file.name)


def config_of(program: Program, formats: dict[str, str]) -> dict[str, Any]:
    """The source's config with the quantization that `load` needs."""
    config = {key: value for key, value in program.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(program.dtype).removeprefix("torch.")
    if program.weights.tied and not program.tied():
        config["tie_word_embeddings"] = False
    if formats or program.edits:
        config["quantization_config"] = {
            "quant_method": "aqtx",
            "layout_version": LAYOUT_VERSION,
            "formats": formats,
            "edits": [edit.to_json() for edit in program.edits],
        }
    return config


def disk_tensors(program: Program, formats: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of everything the checkpoint stores, one matrix in memory at a time.

    Fills `formats` with the format of each quantized site on the way.
    """
    sites, tied = program.sites_by_weight(), program.tied()
    for name in program.weights.names():
        if name in tied:
            continue
        if name not in sites:
            yield name, program.weights.get(name)
        for site in sites.get(name, []):
            yield from matrix_tensors(f"{site.name}.weight", program.stored(site), formats)


def matrix_tensors(key: str, value: Tensor, formats: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """What one matrix stores under `key`: itself, or codes, scales and zero points."""
    if not isinstance(value, QuantizedTensor):
        yield key, value
        return
    formats[key.removesuffix(".weight")] = value.format_name
    for part, tensor in value.to_disk().items():
        yield f"{key}.{part}", tensor
