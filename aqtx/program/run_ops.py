"""What runs in place of an op of a graph: nothing else but on processors that multiply half precision slowly."""

from typing import Any

import torch

from aqtx.machine import half_products

_IN_PLACE_OF = {torch.ops.aten.linear.default: half_products.linear} if half_products.SLOW else {}


def runnable(target: Any) -> Any:
    """The function that computes a node's target, the same in value."""
    return _IN_PLACE_OF.get(target, target)


def traced(target: Any) -> Any:
    """The op that `runnable` took the place of: what a compiler is given."""
    return next((op for op, function in _IN_PLACE_OF.items() if function is target), target)
