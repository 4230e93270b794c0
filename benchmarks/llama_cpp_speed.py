"""llama.cpp at work, for `benchmarks/generate.py --llamacpp PYTHON`: runs in that Python and takes orders line by line.

    python benchmarks/llama_cpp_speed.py MODEL.gguf THREADS SLOTS

`prefill N` reads N tokens, `decode N` makes N behind 16; each answers with the process's CPU seconds for it. It needs
the wheels `xllamacpp` (the library), `llama-cpp-py-sync` (its declarations) and `cffi`, and imports nothing of aqtx.
"""

import importlib.util
import re
import sys
import time
from pathlib import Path
from typing import Any

import cffi
import numpy

PROMPT = 16


def folder_of(module: str) -> Path:
    """Where an installed module lies."""
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, f"{module} is not installed in {sys.executable}"
    return Path(found.origin).parent


def library() -> tuple[cffi.FFI, Any]:
    """llama.cpp's own C interface."""
    declared = (folder_of("llama_cpp_py_sync") / "_cffi_bindings.py").read_text()
    found = re.search(r'_LLAMA_H_CDEF = r?"""(.*?)"""', declared, re.S)
    assert found is not None
    ffi = cffi.FFI()
    ffi.cdef(found[1])
    return ffi, ffi.dlopen(str(folder_of("xllamacpp") / "xllamacpp.abi3.so"))


class Worker:
    """One model and one context, emptied before each order."""

    def __init__(self, file: str, threads: int, slots: int) -> None:
        self.ffi, self.lib = library()
        self._quiet = self.ffi.callback("void(int, const char*, void*)", lambda level, text, data: None)
        self.lib.llama_log_set(self.ffi.cast("ggml_log_callback", self._quiet), self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(file.encode(), self.lib.llama_model_default_params())
        assert self.model != self.ffi.NULL, f"llama.cpp does not load {file}"
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = slots
        settings.n_threads = settings.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, settings)
        assert self.context != self.ffi.NULL
        self.size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def read(self, ids: list[int]) -> int:
        """Read tokens behind those in the context; the likeliest next one."""
        tokens = self.ffi.new("int32_t[]", ids)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        row = numpy.frombuffer(self.ffi.buffer(logits, self.size * 4), numpy.float32)
        return int(row.argmax())

    def empty(self) -> None:
        """Forget everything."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def prefill(self, count: int) -> float:
        """CPU seconds of reading `count` tokens at once."""
        self.empty()
        began = time.process_time()
        self.read([token % 100 for token in range(count)])
        return time.process_time() - began

    def decode(self, count: int) -> float:
        """CPU seconds of `count` tokens one by one."""
        self.empty()
        token = self.read(list(range(PROMPT)))
        began = time.process_time()
        for _ in range(count):
            token = self.read([token])
        return time.process_time() - began


def main() -> None:
    """Serve orders until standard input ends."""
    file, threads, slots = sys.argv[1:]
    worker = Worker(file, int(threads), int(slots))
    print("ready", flush=True)
    for line in sys.stdin:
        order, count = line.split()
        print(getattr(worker, order)(int(count)), flush=True)


if __name__ == "__main__":
    main()
