"""llama.cpp itself, through the wheel `xllamacpp`: its decoders of blocks, its tokenizer and its logits.

The wheel's library exports the whole C interface; `llama-cpp-py-sync` is taken for the text of its declarations.
"""

import ctypes
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np

DECODERS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "mxfp4", "nvfp4")


def _folder(module: str) -> Path:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def decode(data: np.ndarray, kind: str, count: int) -> np.ndarray:
    """float32 values of blocks by ggml's own `dequantize_row_*`."""
    library = ctypes.CDLL(str(_folder("xllamacpp") / "xllamacpp.abi3.so"))
    [name] = [name for name in DECODERS if name.upper() == kind.upper()]
    rows, out = np.ascontiguousarray(data), np.empty(count, np.float32)
    function = getattr(library, f"dequantize_row_{name}")
    function(rows.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(count))
    return out


def quantize(weight: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    """float32 values [N, K] that ggml's own `quantize_*` finds, weighted by the importance of each column [K]."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    library = ctypes.CDLL(str(_folder("xllamacpp") / "xllamacpp.abi3.so"))
    size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    rows, columns = weight.shape
    out = np.empty(rows * columns // size * num_bytes, np.uint8)
    source = np.ascontiguousarray(weight, np.float32)
    given = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointers = [each if each is None else each.ctypes.data_as(ctypes.c_void_p) for each in (source, out, given)]
    function = getattr(library, f"quantize_{next(name for name in DECODERS if name.upper() == kind.upper())}")
    function.restype = ctypes.c_size_t
    function(pointers[0], pointers[1], ctypes.c_int64(rows), ctypes.c_int64(columns), pointers[2])
    return decode(out, kind, weight.size).reshape(weight.shape)


class Model:
    """A GGUF file in llama.cpp on one thread."""

    def __init__(self, file: Path, length: int = 512, vocab_only: bool = False) -> None:
        import cffi

        declared = (_folder("llama_cpp_py_sync") / "_cffi_bindings.py").read_text()
        found = re.search(r'_LLAMA_H_CDEF = r?"""(.*?)"""', declared, re.S)
        assert found is not None
        self.ffi = cffi.FFI()
        self.ffi.cdef(found[1])
        self.lib: Any = self.ffi.dlopen(str(_folder("xllamacpp") / "xllamacpp.abi3.so"))
        self._quiet = self.ffi.callback("void(int, const char*, void*)", lambda level, text, data: None)
        self.lib.llama_log_set(self.ffi.cast("ggml_log_callback", self._quiet), self.ffi.NULL)
        self.lib.llama_backend_init()
        loading = self.lib.llama_model_default_params()
        loading.vocab_only = vocab_only
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), loading)
        assert self.model != self.ffi.NULL, f"llama.cpp does not load {file}"
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = 1
        self.length, self.settings = length, settings
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)

    def logits(self, ids: list[int]) -> np.ndarray:
        """[tokens, vocabulary], in a context of its own."""
        context = self.lib.llama_init_from_model(self.model, self.settings)
        assert context != self.ffi.NULL and len(ids) <= self.length
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
            batch.seq_id[at][0] = 0
        assert self.lib.llama_decode(context, batch) == 0
        size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        rows = [self.ffi.buffer(self.lib.llama_get_logits_ith(context, at), size * 4) for at in range(len(ids))]
        made = np.stack([np.frombuffer(row, np.float32).copy() for row in rows])
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        return made

    def continue_greedily(self, ids: list[int], count: int) -> list[int]:
        """The likeliest next tokens, each from the logits of the whole text so far."""
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.logits([*ids, *made])[-1].argmax()))
        return made

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, with or without the special tokens before and behind it."""
        data = text.encode()
        out = self.ffi.new("int32_t[]", len(data) + 8)
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), out, len(data) + 8, special, True)
        return list(out[0:count])
