"""The quantized checkpoint: a normal Hugging Face folder plus what a quantized model needs.

Tensors of a quantized site are `<site>.weight.qdata|scale|zero_point`; the formats by site and the
structural edits stand in config.json under `quantization_config`. Loading traces the config's
model on meta, replays the edits and reads the weights lazily: bit-exact, and no pickle anywhere.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from aqtx.checkpoint.checks import CHECKSUMS, DIGEST, LAYOUT_VERSION, UNAWARE, WHY, digest_of
from aqtx.checkpoint.locate import inside
from aqtx.checkpoint.reader import INDEX
from aqtx.checkpoint.shards import write_shards
from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor
from aqtx.machine.files import make_folder, read_json, sha256, write_text, writing
from aqtx.machine.marker import MARKER, add_names, mark, own_files, run_of
from aqtx.machine.output_folder import OutputFolder
from aqtx.models.config_text import config_text
from aqtx.program.program import Program

MODEL_FILES = (
    *("config.json", "plan.json", INDEX, CHECKSUMS),
    *("model-*-of-*.safetensors", "shard-*", "elements-*.scratch"),  # the last two while they are being made
)
_PASSED_ON = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("generation_config.json", "chat_template*", "additional_chat_templates/*.jinja"),
)


def save(program: Program, directory: str | Path) -> Path:
    """Write the program as a checkpoint folder; it must not exist or be empty.

    The folder appears under its name only when it is complete.
    """
    directory = Path(directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory}: the folder is not empty; name another one")
    _refuse_codes(program)
    folder = OutputFolder(directory)
    try:
        folder.refuse_output(replace=False)
        folder.refuse_staging()
        folder.clear_staging()
        folder.open_staging("save", MODEL_FILES)
        write_model(program, folder.staging)
        write_checksums(folder.staging, own_files(folder.staging))
        folder.publish(replace=False)
    finally:
        folder.release()
    return directory


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA-256 digests of a folder's files, and let its mark name what is there and nothing else."""
    stays = [name for name in names if name not in (MARKER, CHECKSUMS)]
    sums = {name: sha256(folder / name) for name in stays}
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
    mark(folder, run_of(folder), [*sums, CHECKSUMS])


def write_model(program: Program, directory: Path) -> None:
    """Weights, config, plan and tokenizer files of a program, written into `directory`."""
    _refuse_codes(program)
    make_folder(directory)
    formats: dict[str, str] = {}
    write_shards(disk_tensors(program, formats), directory)
    write_text(directory / "config.json", config_text(config_of(program, formats)))
    if program.plan is not None:
        write_text(directory / "plan.json", json.dumps(program.plan.to_json(), indent=1) + "\n")
    if program.folder is not None:
        copy_tokenizer(program.folder, directory)


def _refuse_codes(program: Program) -> None:
    if len(program.codes) and not program.emitted:
        raise InputError("the program holds codes that were not emitted: add `emit` as the last pass before saving")


def copy_tokenizer(folder: Path, directory: Path) -> None:
    """Copy what belongs to a model beside its weights and config."""
    files = sorted({file for pattern in _PASSED_ON for file in folder.glob(pattern) if file.is_file()})
    names = [file.relative_to(folder).as_posix() for file in files]
    add_names(directory, names)
    for file, name in zip(files, names, strict=True):
        make_folder((directory / name).parent)
        if name == "tokenizer_config.json" and "auto_map" in (told := read_json(inside(folder, file))):
            # it names Python files, which are not passed on: whoever allows such code would look for them in vain
            plain = {key: value for key, value in told.items() if key != "auto_map"}
            write_text(directory / name, json.dumps(plain, indent=2) + "\n")
            continue
        with writing(directory / name, file.stat().st_size):
            shutil.copyfile(inside(folder, file), directory / name)


def config_of(program: Program, formats: dict[str, str]) -> dict[str, Any]:
    """The source's config with the quantization that `load` needs."""
    config = {key: value for key, value in program.config.items() if key not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(program.dtype).removeprefix("torch.")
    if program.weights.tied and not program.tied():
        config["tie_word_embeddings"] = False
    if formats or program.edits:
        told = {
            "quant_method": "aqtx",
            "layout_version": LAYOUT_VERSION,
            "formats": formats,
            "edits": [edit.to_json() for edit in program.edits],
        }
        config["quantization_config"] = {**told, DIGEST: digest_of(told)}
        config[UNAWARE] = WHY
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
            yield name, program.weights.on_disk(name)
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
