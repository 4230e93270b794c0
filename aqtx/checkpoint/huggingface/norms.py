"""transformers' RMSNorms as one `aten.rms_norm` each, where a probe proves them to be one.

Every family has its own class, with its own spelling of epsilon and, as Gemma's, a gain stored less
one. Names prove nothing: each class is run once on random input against the formulas, and a norm
that fits none of them is left as it is.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Formula = Callable[[Tensor, Tensor, float], Tensor]


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gain as stored."""
    return F.rms_norm(x, weight.shape, weight, eps)


def shifted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's: the gain is stored less one, and the product is float32's."""
    return F.rms_norm(x.float(), weight.shape, weight.float() + 1, eps).to(x.dtype)


def canonical_norms(model: nn.Module) -> int:
    """Let every proven RMSNorm of a model run as `F.rms_norm`; returns how many there are."""
    found: dict[tuple[type, float], Formula | None] = {}
    count = 0
    for module in model.modules():
        eps = epsilon(module)
        if eps is None:
            continue
        kind = (type(module), eps)
        if kind not in found:
            found[kind] = prove(module, eps)
        formula = found[kind]
        if formula is not None:
            module.forward = _bind(module, formula, eps)
            count += 1
    return count


def epsilon(module: nn.Module) -> float | None:
    """The epsilon of a module that is named an RMSNorm and has one gain vector, else None."""
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1:
        return None
    found = [getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)]
    return float(found[0]) if found and isinstance(found[0], float) else None


def prove(module: nn.Module, eps: float) -> Formula | None:
    """The formula that equals the module's own forward on random input, if one does."""
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    weight = probe._parameters["weight"]
    assert weight is not None
    with torch.device("cpu"), torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        x = 3 * torch.randn(4, *weight.shape, generator=generator)
        for formula in (plain, shifted):
            # Some units in the last place of values below 30: no wrong formula comes that close.
            if torch.allclose(probe(x), formula(x, weight, eps), rtol=1e-5, atol=1e-5):
                return formula
    return None


def _bind(module: nn.Module, formula: Formula, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return formula(x, weight, eps)

    return forward
