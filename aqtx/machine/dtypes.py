"""Which floating-point dtypes hold the values of others."""

from collections.abc import Iterable

import torch


def is_wider(dtype: torch.dtype, usual: torch.dtype) -> bool:
    """Whether values of a dtype would be rounded in the usual one."""
    return torch.promote_types(dtype, usual) != usual


def widest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """The dtype that holds the values of all, None where one is unknown, or there is none."""
    found: torch.dtype | None = None
    for dtype in dtypes:
        if dtype is None:
            return None
        found = dtype if found is None else torch.promote_types(found, dtype)
    return found
