"""Number formats: the table, exact codecs, packed tensors and the ops that compute with them.

Names resolve on first use, so that checking a format's name does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aqtx.formats.table import Format, names, parse

if TYPE_CHECKING:
    from aqtx.formats.codec import fake_quantize, quantize
    from aqtx.formats.mixed import MixedExperts
    from aqtx.formats.tensor import QuantizedTensor, dequantized
    from aqtx.formats.torchao_convert import from_torchao, register_safetensors, to_torchao

__all__ = [
    "Format",
    "MixedExperts",
    "QuantizedTensor",
    "dequantized",
    "fake_quantize",
    "from_torchao",
    "names",
    "parse",
    "quantize",
    "register_safetensors",
    "to_torchao",
]

_HOMES = {
    "MixedExperts": "aqtx.formats.mixed",
    "QuantizedTensor": "aqtx.formats.tensor",
    "dequantized": "aqtx.formats.tensor",
    "fake_quantize": "aqtx.formats.codec",
    "from_torchao": "aqtx.formats.torchao_convert",
    "quantize": "aqtx.formats.codec",
    "register_safetensors": "aqtx.formats.torchao_convert",
    "to_torchao": "aqtx.formats.torchao_convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
