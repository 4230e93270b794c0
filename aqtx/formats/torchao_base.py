"""The one place that imports torchao's tensor class.

torchao logs two lines about its optional `.so` files at import; this project uses none of them.
"""

import logging
import os
import warnings
from typing import Any

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")


def _import_quietly() -> Any:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.utils import TorchAOBaseTensor
    finally:
        logging.disable(previous)
    return TorchAOBaseTensor


TorchAOBaseTensor: Any = _import_quietly()
