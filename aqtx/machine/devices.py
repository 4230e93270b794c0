"""Where a run computes."""

import torch

from aqtx.errors import InputError


def device_of(name: str) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`; `auto` takes a GPU when there is one.

    Raises:
        InputError: `cuda` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
