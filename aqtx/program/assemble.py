"""Put the codes of single sites together into the parameters that a graph computes with."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aqtx.program.program import Program, Site


def assemble(program: "Program", sites: "list[Site]") -> Tensor:
    """The parameter of `sites` (all of one weight): rounded where codes exist, as stored elsewhere.

    Of an emitted program a plain matrix gives its `QuantizedTensor` and a stack `MixedExperts`,
    whose experts may carry different formats; before that, the values that the codes mean.
    """
    matrices = [program.stored(site) for site in sites]
    if not program.emitted:
        values = [matrix.dequantize() if hasattr(matrix, "format_name") else matrix for matrix in matrices]
        return values[0] if sites[0].expert is None else torch.stack(values)
    if sites[0].expert is None:
        return matrices[0]
    from aqtx.formats import MixedExperts

    return MixedExperts.from_experts(matrices, program.dtype)
