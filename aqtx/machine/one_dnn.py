"""How many compiled kernels oneDNN may keep."""

import os


def keep_few_kernels() -> None:
    """Hold oneDNN to 128 kernels, unless the environment says a number; it reads it when it computes first.

    It compiles one for every shape and keeps 1024, some hundred MB. Experts see another number of rows in every batch,
    so few are used again: with 128 the quickstart takes as long.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
