"""Mixed-precision quantization of mixture-of-experts language models.

    import aqtx
    report = aqtx.apply("quickstart")           # a recipe's path or a shipped name
    program = aqtx.load("out/quickstart")       # the quantized model
    logits = program.module()(ids)

Names load on first use, so that `import aqtx` and `aqtx --help` stay fast.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from aqtx.checkpoint.huggingface import hook
from aqtx.version import __version__

# torchao looks for compiled kernels that this package does not use, and prints two warnings about their absence.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

hook.install()  # checkpoints load through transformers after `import aqtx`

if TYPE_CHECKING:
    from aqtx.checkpoint.open import load as load
    from aqtx.checkpoint.open import trace as trace
    from aqtx.checkpoint.write import save as save
    from aqtx.errors import InputError as InputError
    from aqtx.program.program import Program as Program
    from aqtx.runs.apply import apply as apply
    from aqtx.runs.pipeline import run as run
    from aqtx.sensitivity.alpha import alpha as alpha

# name -> the module that defines it (PEP 562)
_HOMES = {
    "InputError": "aqtx.errors",
    "Program": "aqtx.program.program",
    "trace": "aqtx.checkpoint.open",
    "alpha": "aqtx.sensitivity.alpha",
    "apply": "aqtx.runs.apply",
    "run": "aqtx.runs.pipeline",
    "save": "aqtx.checkpoint.write",
    "load": "aqtx.checkpoint.open",
}
_MODULES = ("formats", "numerics")

__all__ = [*_HOMES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"aqtx.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aqtx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
