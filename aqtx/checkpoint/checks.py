"""Whether a checkpoint folder is what was written: checksums of its files, a digest of its formats and edits."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqtx.errors import InputError
from aqtx.formats.table import Format
from aqtx.machine.files import read_json, sha256

CHECKSUMS = "checksums.json"
LAYOUT_VERSION = 1
DIGEST = "sha256"  # key of `quantization_config`
# transformers reads weights from the file that this key of config.json names. Without our quantizer it would pass over
# the codes and fill the model at random; with this it fails, and shows why.
UNAWARE = "transformers_weights"
WHY = "quantized by aqtx; `import aqtx` before loading"
_REBUILT = ("report.html", "figures/")  # by `aqtx report`, at any time
_METHOD = "aqtx"


def digest_of(quantization: Mapping[str, Any]) -> str:
    """One digest over the formats, the edits and the layout version of a `quantization_config`."""
    told = {key: quantization.get(key) for key in ("layout_version", "formats", "edits")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> None:
    """Compare every file with the checksum that was written beside it.

    Raises:
        InputError: a file is missing or has changed; names each.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return
    sums = read_json(file)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise InputError(f"{file} must map file names to SHA-256 digests")
    problems = []
    for name, wanted in sums.items():
        if name.startswith(_REBUILT):
            continue
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{file}: {name!r} lies outside the folder")
        elif not path.is_file():
            problems.append(f"{path} is missing, and {CHECKSUMS} lists it")
        elif sha256(path) != wanted:
            problems.append(f"{path} is not what was written: its SHA-256 differs from {CHECKSUMS}")
    if problems:
        raise InputError(*problems)


def read_quantization(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, str], list[Any]]:
    """(formats by site, edits) of a config.json, checked; both empty for a checkpoint that is not quantized by us.

    Raises:
        InputError: the section is malformed, of another layout version, or not what was written.
    """
    found = config.get("quantization_config")
    if found is None:
        return {}, []
    where = f"{folder / 'config.json'}: quantization_config"
    if not isinstance(found, dict):
        raise InputError(f"{where} must be an object, not {found!r:.80}")
    if found.get("quant_method") != _METHOD:
        return {}, []
    check_version(found, where)
    formats, edits = found.get("formats", {}), found.get("edits", [])
    if not isinstance(formats, dict) or not all(isinstance(name, str) for name in formats.values()):
        raise InputError(f"{where}: formats must map sites to names of formats")
    if not isinstance(edits, list):
        raise InputError(f"{where}: edits must be a list")
    return formats, edits


def check_named_weights(config: dict[str, Any], folder: Path) -> None:
    """Take the key off by which an unaware loader fails; InputError where it names a file that we would not read."""
    named = config.pop(UNAWARE, None)
    if named not in (None, WHY, "model.safetensors", "model.safetensors.index.json"):
        raise InputError(f"{folder / 'config.json'}: {UNAWARE} {named!r:.80} is not supported; rename the file")


def check_version(quantization: Mapping[str, Any], where: str) -> None:
    """InputError unless this program reads the layout and the section is the one that was written."""
    version, digest = quantization.get("layout_version"), quantization.get(DIGEST)
    if version != LAYOUT_VERSION or isinstance(version, bool):
        raise InputError(f"{where}: layout_version {version!r:.80} is not {LAYOUT_VERSION}, which this aqtx reads")
    if digest is None:
        warnings.warn(f"{where} carries no digest (an older aqtx wrote it), so it is taken as it is", stacklevel=2)
    elif digest != digest_of(quantization):
        raise InputError(f"{where}: formats or edits are not those that were written (their digest differs)")


def parts_of(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Part -> (safetensors' dtype, shape) of a matrix [N, K] on disk in a format."""
    rows, columns = shape
    if not fmt.is_packed:
        return {"qdata": ("BF16", shape)}
    blocks = fmt.num_blocks(columns)
    if bits := fmt.scale.code_bits:
        codes, supers = fmt.num_scale_codes(columns), fmt.num_supers(columns)
        coded = {"scale": ("U8", (rows, -(-codes * bits // 8))), "super_scale": ("F16", (rows, supers))}
        return {"qdata": ("U8", (rows, fmt.row_bytes(columns))), **coded}
    kinds = {"bf16": "BF16", "e8m0": "U8", "e4m3": "U8"}
    found: dict[str, tuple[str, tuple[int, ...]]] = {"qdata": ("U8", (rows, fmt.row_bytes(columns)))}
    found["scale"] = (kinds[fmt.scale.name], (rows, blocks))
    if fmt.asymmetric:
        found["zero_point"] = ("U8", (rows, blocks))
    if fmt.scale.per_matrix_bytes:
        found["per_tensor_scale"] = ("F32", (1, 1))
    return found
