"""The quantized checkpoint: a normal Hugging Face folder plus what a quantized model needs.

Tensors of a quantized site are `<site>.weight.qdata|scale|zero_point`; the formats by site and the
structural edits stand in config.json under `quantization_config`. Loading traces the config's
model on meta, replays the edits and reads the weights lazily: bit-exact, and no pickle anywhere.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aqtx.checkpoint.shards import write_shards
from aqtx.errors import InputError
from aqtx.program.names import PARTS, expert_key, is_stacked
from aqtx.program.program import Program
from aqtx.program.trace import build_program

if TYPE_CHECKING:
    from aqtx.checkpoint.reader import CheckpointReader

LAYOUT_VERSION = 1
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
            "edits": program.edits,
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
    from aqtx.formats import QuantizedTensor

    if not isinstance(value, QuantizedTensor):
        yield key, value
        return
    formats[key.removesuffix(".weight")] = value.format_name
    for part, tensor in value.to_disk().items():
        yield f"{key}.{part}", tensor


class CheckpointSource:
    """Weights of a checkpoint folder by parameter name; stacks are put together when asked for."""

    def __init__(self, reader: "CheckpointReader", formats: dict[str, str], dtype: torch.dtype) -> None:
        self.reader = reader
        self.formats = formats
        self.dtype = dtype
        self.shapes: dict[str, tuple[int, ...]] = {}  # logical shapes by parameter, known once the model is built

    def parameter(self, name: str) -> Tensor:
        """The whole parameter; experts of a stack with any format among them become `MixedExperts`."""
        shape = self.shapes[name]
        if not is_stacked(name, shape):
            return self._matrix(name, shape)
        experts = [self.expert(name, index) for index in range(shape[0])]
        if any(hasattr(expert, "format_name") for expert in experts):
            from aqtx.formats import MixedExperts

            return MixedExperts.from_experts(experts, self.dtype)
        return torch.stack(experts)

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix."""
        return self._matrix(expert_key(name, index), self.shapes[name][1:])

    def _matrix(self, key: str, shape: tuple[int, ...]) -> Tensor:
        site = key.removesuffix(".weight")
        if site not in self.formats:
            return self.reader.get(key)
        from aqtx.formats import QuantizedTensor

        parts = {part: self.reader.get(f"{key}.{part}") for part in PARTS if f"{key}.{part}" in self.reader}
        return QuantizedTensor.from_disk(parts, self.formats[site], shape, self.dtype)


def load(directory: str | Path) -> Program:
    """Open a checkpoint folder that `save` or `aqtx apply` wrote; logits are bit-equal to those before saving."""
    return open_program(directory, None)


def open_program(source: str | Path, dtype: torch.dtype | None, *, config_only: bool = False) -> Program:
    """A Program over a checkpoint: local folder, shipped name or hub name, quantized or not."""
    from aqtx.checkpoint.reader import CheckpointReader, locate
    from aqtx.models import build, load_config, supported

    folder = locate(source)
    config = load_config(folder)
    if config_only:
        return _without_weights(config, dtype, folder)
    reader = CheckpointReader(folder)
    dtype = dtype or reader.dtype()
    quantization = config.get("quantization_config", {})
    weights = CheckpointSource(reader, quantization.get("formats", {}), dtype)
    if supported(config):
        program = build_program(lambda: build(config), weights, config=config, dtype=dtype, folder=folder)
        tied = program.weights.tied
        stored = {name: spec.shape for name, spec in program.weights.specs.items() if name not in tied}
        reader.check(stored, quantized=weights.formats, tied=tied)
    else:
        from aqtx.checkpoint.huggingface.open import foreign_source, trace_foreign

        program = trace_foreign(config, foreign_source(reader, config, dtype, weights), dtype, folder)
    weights.shapes = {name: spec.shape for name, spec in program.weights.specs.items()}
    for edit in quantization.get("edits", []):
        program.edit(edit)
    return program


def _without_weights(config: dict[str, Any], dtype: torch.dtype | None, folder: Path) -> Program:
    """A Program of a config.json alone; reading a weight is an error."""
    from aqtx.models import build

    declared = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return build_program(
        lambda: build(config), _NoWeights(folder), config=config, dtype=dtype or getattr(torch, declared), folder=folder
    )


@dataclass(frozen=True)
class _NoWeights:
    """In the place of weights where only config.json is looked at."""

    folder: Path

    def parameter(self, name: str) -> Tensor:
        raise InputError(f"{self.folder}: {name} cannot be read, since only config.json was opened")

    def expert(self, name: str, index: int) -> Tensor:
        return self.parameter(name)
