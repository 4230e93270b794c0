"""What runs in place of an op of a graph: nothing else but on processors that multiply half precision slowly."""

from typing import Any

import torch

from aqtx.machine import half_products

_WIDENED = {
    torch.ops.aten.linear.default: half_products.linear,
    torch.ops.aten.scaled_dot_product_attention.default: half_products.attention,
    torch.ops.aten.matmul.default: half_products.product,
    torch.ops.aten.bmm.default: half_products.batch_product,
}
_IN_PLACE_OF = _WIDENED if half_products.SLOW else {}


def runnable(target: Any) -> Any:
    """The function that computes a node's target, the same in value."""
    return _IN_PLACE_OF.get(target, target)


def traced(target: Any) -> Any:
    """The op that `runnable` took the place of: what a compiler is given."""
    return next((op for op, function in _IN_PLACE_OF.items() if function is target), target)
