"""The metadata of a GGUF file: keys of the architecture and the tokenizer, or those of a template."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map

from aqtx.checkpoint.exports.gguf_families import FAMILIES, Family
from aqtx.checkpoint.exports.gguf_rules import PAIRED
from aqtx.checkpoint.exports.gguf_tokenizer import add_tokenizer, tokenizer_problems
from aqtx.errors import InputError, malformed
from aqtx.models import build

_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")


def family_of(config: Mapping[str, Any], template: Path | None) -> Family:
    """The row of a model; with a template one of its architecture, which the model itself need not be."""
    if template is None:
        return FAMILIES[config["model_type"]]
    arch = str(GGUFReader(template).fields["general.architecture"].contents())
    return _of_arch(config, arch)


def _of_arch(config: Mapping[str, Any], arch: str) -> Family:
    own = FAMILIES.get(str(config.get("model_type")))
    return own if own is not None and own.arch == arch else next(row for row in FAMILIES.values() if row.arch == arch)


_OF_TEMPLATES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size"}


def template_problems(config: Mapping[str, Any], template: Path) -> list[str]:
    """Why metadata of another file do not go with a model, in sentences.

    Some architectures are stored otherwise than their checkpoints (Gemma's norms plus one), so only those of the rows
    are taken, whatever the model calls itself.
    """
    if not template.is_file():
        return [f"the template {template} is no file"]
    with malformed(f"the template {template} is no GGUF file"):
        fields = GGUFReader(template).fields
        arch = str(fields["general.architecture"].contents())
    known = template_archs(config)
    if arch not in known:
        told = ", ".join(known)
        return [f"the template's architecture {arch} may be stored otherwise than its checkpoints; known are {told}"]
    found = {key: fields.get(f"{arch}.{key}") for key in (*_OF_TEMPLATES, "nextn_predict_layers")}
    counts = {key: field.contents() for key, field in found.items() if field is not None}
    if "block_count" in counts:  # layers that predict several tokens at once are left out here
        counts["block_count"] -= counts.pop("nextn_predict_layers", 0)
    problems = [
        f"the template has {key} {value}, and config.json has {_OF_TEMPLATES[key]} {config.get(_OF_TEMPLATES[key])}"
        for key, value in counts.items()
        if value != config.get(_OF_TEMPLATES[key])
    ]
    return [*problems, *config_problems(config)]


def template_archs(config: Mapping[str, Any]) -> list[str]:
    """The architectures whose files can be templates of a model: those stored as checkpoints are, and its own."""
    own = FAMILIES.get(str(config.get("model_type")))
    plain = {row.arch for row in FAMILIES.values() if row.rules in ({}, PAIRED)}
    return sorted(plain | ({own.arch} if own else set()))


def missing(config: Mapping[str, Any], folder: Path | None) -> list[str]:
    """What llama.cpp must be told and only a template could tell, in sentences."""
    kind = config.get("model_type")
    if kind in FAMILIES:
        return tokenizer_problems(folder, config.get("vocab_size"))
    return [
        f"aqtx writes no GGUF of model_type {kind!r}, only of {', '.join(FAMILIES)}; with --template also of a model "
        f"whose GGUF file, made by another tool, is of the architecture {' or '.join(template_archs(config))}"
    ]


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp would not compute this model, in sentences; nothing on a family that has no row."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        return []
    family = FAMILIES[kind]
    problems = [
        f"config.json: llama.cpp has {key} {' or '.join(map(repr, values))} built in for {kind}, not {found!r}"
        for key, values in family.assumed.items()
        if (found := config.get(key)) not in values
    ]
    made = parsed(config)
    problems += [f"config.json: llama.cpp's {kind} {limit}" for limit in family.limits(made)]
    if made.decoder.rope.kind not in family.ropes:
        problems.append(f"config.json: llama.cpp's {kind} has no rotary variant {made.decoder.rope.kind!r}")
    return problems


def parsed(config: Mapping[str, Any]) -> Any:
    """The config of the model that is built of a config.json."""
    with torch.device("meta"):
        return build(config).config


def names_of(arch: str, num_layers: int) -> TensorNameMap:
    """Names on disk, without the expert's number, to names in GGUF."""
    found = [key for key, name in MODEL_ARCH_NAMES.items() if name == arch]
    if not found:
        raise InputError(f"the architecture {arch!r} of the template is unknown to gguf {version('gguf')}")
    return get_tensor_name_map(found[0], num_layers)


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any], folder: Path, name: str) -> None:
    """The architecture's keys and the tokenizer, from config.json and the tokenizer's files."""
    writer.add_name(name)
    _add_numbers(writer, config)
    _add_kind(writer)
    add_tokenizer(writer, folder, config["vocab_size"])
    writer.add_string("aqtx.config", json.dumps(dict(config)))


def _add_numbers(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    for key, value in FAMILIES[config["model_type"]].numbers(parsed(config)).items():
        getattr(writer, f"add_{key}")(value)


def _add_kind(writer: GGUFWriter) -> None:
    writer.add_file_type(LlamaFileType.GUESSED)
    writer.add_quantization_version(2)


def copy_metadata(writer: GGUFWriter, template: Path, config: Mapping[str, Any], folder: Path | None) -> None:
    """All keys of an existing file but those that tell its types; of a known family only those of the tokenizer."""
    own = FAMILIES.get(str(config.get("model_type")))
    known = own is not None and own.arch == writer.arch
    left_out = ("GGUF.", "split.", *((f"{writer.arch}.",) if known else ()))
    for found in GGUFReader(template).fields.values():
        if found.name.startswith(left_out) or found.name in _OWN_KEYS:
            continue
        kind, inner = found.types[0], found.types[-1]
        writer.add_key_value(
            found.name, found.contents(), kind, sub_type=inner if kind is GGUFValueType.ARRAY else None
        )
    if known:
        _add_numbers(writer, config)
    _add_kind(writer)
    writer.add_string("aqtx.config", json.dumps(dict(config)))
    file = None if folder is None else folder / "tokenizer.json"
    if file is not None and file.is_file() and "tokenizer.huggingface.json" not in writer.kv_data[0]:
        writer.add_string("tokenizer.huggingface.json", file.read_text(encoding="utf-8"))
