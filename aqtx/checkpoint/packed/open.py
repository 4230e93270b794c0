"""A folder's reader by what its config.json says of packed weights; what is not understood is refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aqtx.checkpoint.packed.compressed import compressed_reader
from aqtx.checkpoint.packed.compressed_config import Schemes
from aqtx.checkpoint.packed.fp8 import fp8_reader
from aqtx.checkpoint.packed.mxfp4 import mxfp4_reader
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError

OURS = "aqtx"
_SECTIONS = ("quantization_config", "compression_config")
_FP8 = ("fp8", "fbgemm_fp8")
_READ = "FP8 with real scales, MXFP4 as of gpt-oss, compressed-tensors"


def packing_of(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """`quantization_config` of a config.json, empty where nothing is packed; nothing else is read.

    Raises:
        InputError: weights are packed in a way that is not understood; one sentence that names it.
    """
    section = next((config[key] for key in _SECTIONS if config.get(key) is not None), None)
    where = f"{folder / 'config.json'}: quantization_config"
    if section is None:
        if (folder / "hf_quant_config.json").is_file():
            raise InputError(_refusal(f"{folder / 'hf_quant_config.json'}", "modelopt"))
        return {}
    if not isinstance(section, dict):
        raise InputError(f"{where} must be an object, not {section!r:.80}")
    method = section.get("quant_method")
    if method == "compressed-tensors":
        Schemes.read(section, folder)
    elif method not in (OURS, *_FP8, "mxfp4"):
        raise InputError(_refusal(where, method))
    return section


def packings(model_type: str | None) -> tuple[str, ...]:
    """Names of what a family's packed weights may be; None stands for one that is only traced."""
    return ("fp8", "compressed-tensors", *(("mxfp4",) if model_type == "gpt_oss" else ()))


def _refusal(where: str, method: Any) -> str:
    told = f"{where}: the checkpoint is quantized already, by {method!r:.80}, which aqtx does not read"
    return f"{told} (it reads {_READ}); give the model that it was made from"


def plain_config(config: dict[str, Any], packing: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model whose weights are read: without what others packed, which is plain from there on."""
    if packing.get("quant_method") in (None, OURS):
        return config
    return {key: value for key, value in config.items() if key not in _SECTIONS}


def open_reader(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> CheckpointReader:
    """The tensors of a folder, packed ones as the values they mean in `dtype` (None: what config.json declares).

    Raises:
        InputError: the folder is damaged, or packed in a way that is not understood.
    """
    section = packing_of(config, folder)
    files, method = CheckpointReader(folder), section.get("quant_method")
    if method == "compressed-tensors":
        return compressed_reader(files, section, config, dtype)
    if method in _FP8:
        return fp8_reader(files, section, config, dtype)
    if method == "mxfp4":
        return mxfp4_reader(files, config, dtype)
    return files
