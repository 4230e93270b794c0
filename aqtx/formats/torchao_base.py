"""The one way by which torchao is imported.

torchao logs two lines about its optional `.so` files at import; this project uses none of them. Its
`prototype.gptq` changes Inductor's configuration when imported, and several of its modules are gone on its main
branch: what is imported here is `utils` (the base class), the MX and NVFP4 tensors as conversion targets,
and the safetensors registry.
"""

import logging
import os
import warnings
from importlib import import_module
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")


def import_quietly(name: str) -> Any:
    """A torchao module, without the messages of its import."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    finally:
        logging.disable(previous)


TorchAOBaseTensor: Any = import_quietly("torchao.utils").TorchAOBaseTensor
