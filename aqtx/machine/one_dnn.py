"""How many compiled kernels oneDNN may keep, and torch of what describes them."""

import os

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN's kernels, of torch's descriptions


def keep_few_kernels() -> None:
    """Hold oneDNN to 128 kernels and torch to as many descriptions, unless the environment says a number.

    Each is made for every shape, and 1024 are kept, some hundred MB of each: a description takes 0.3 MB, whatever the
    matrix. Experts see another number of rows in every batch, so few are used again: with 128 the quickstart takes as
    long. Both are read once, when oneDNN computes first.
    """
    for name in _CAPACITIES:
        os.environ.setdefault(name, "128")
