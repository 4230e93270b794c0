"""Tensors in, tensors out: no graph, no module, no file."""

from aqtx.numerics.allocate import Allocation, allocate
from aqtx.numerics.alpha import alpha_hill
from aqtx.numerics.gptq import gptq
from aqtx.numerics.hadamard import hadamard

__all__ = ["Allocation", "allocate", "alpha_hill", "gptq", "hadamard"]
