"""Packed matrices with one input as one matrix: their rows one behind the other, bit for bit."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from aqtx.formats import kernel
from aqtx.formats.tensor import QuantizedTensor


def layout_of(weight: Tensor) -> Hashable | None:
    """What matrices [N, K] must share for their rows to be joined; None for one that the kernel does not decode."""
    if not isinstance(weight, QuantizedTensor) or weight.dim() != 2 or not kernel.decodes(weight.format):
        return None
    per_matrix = weight.per_tensor_scale
    scale = None if per_matrix is None else float(per_matrix)  # one number for all rows
    return weight.format_name, weight.num_columns, weight.orig_dtype, weight.device, scale


def join_rows(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices [N_i, K] of one layout as one of [sum N_i, K]: codes, scales and zero points as they are."""
    first = weights[0]
    assert len({layout_of(weight) for weight in weights}) == 1 and layout_of(first) is not None
    parts = {
        name: part if name == "per_tensor_scale" else torch.cat([getattr(weight, name) for weight in weights])
        for name, part in first.parts().items()
    }
    return QuantizedTensor(parts.pop("qdata"), first.format_name, first.num_columns, first.orig_dtype, **parts)
