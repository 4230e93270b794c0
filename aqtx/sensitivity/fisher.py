"""The empirical Fisher information: how much the loss bends along each weight, from gradients on calibration text.

A rounding W -> Q raises the mean loss per token by about 1/2 sum F_nk (W - Q)_nk^2, with F the mean square of
the gradient of one token's loss. Gradients of single tokens are not to be had cheaply; those of sequences of T
tokens are, and as tokens' gradients are nearly uncorrelated, F = T mean((gradient of the sequence's mean
loss)^2).

Annotation: `fisher`, or `fisher_matrix` {format: 1/2 sum F (W - Q)^2}, in nats per token. One backward pass per
sequence; memory for F is four bytes per weight, or with `per_matrix`, which takes F's mean for each matrix,
next to nothing beside the gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.program import Program, Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has, weighted_errors

KEYS = {"element": "fisher", "matrix": "fisher_matrix"}


def measure_fisher(
    program: Program, wanted: Sequence[Request], context: Context, *, num_sequences: int = 32, per_matrix: bool = False
) -> None:
    """Annotate the sites that lack `fisher` for their formats; without such sites no text is read."""
    key = KEYS["matrix" if per_matrix else "element"]
    missing = [(site, formats) for site, formats in wanted if not has(site, key, formats)]
    if not missing:
        return
    ids = context.calibration()[:num_sequences]
    information = _information(program, [site for site, _ in missing], ids, context, per_matrix)
    for site, formats in context.progress(missing, description="fisher errors"):
        F = information[site.weight]
        importance = F if site.expert is None else F[site.expert]
        annotate(site, key, weighted_errors(program, site, formats, 0.5 * importance))


def _information(
    program: Program, sites: Sequence[Site], ids: Tensor, context: Context, per_matrix: bool
) -> dict[str, Tensor]:
    """F of each parameter, or its mean over each matrix [E, 1, 1], [1, 1]."""
    module = program.module()
    parameters = {name: module.get_parameter(name) for name in {site.weight: None for site in sites}}
    total: dict[str, Tensor] = {}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    length = ids.shape[1] - 1
    for sequence in context.progress(ids.to(program.device), description="fisher"):
        logits = module(sequence[None])[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, sequence[1:]).backward()
        for name, parameter in parameters.items():
            square = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float().square()
            square = square.mean((-2, -1), keepdim=True) if per_matrix else square
            total[name] = square if name not in total else total[name].add_(square)
            parameter.grad = None
    return {name: value * (length / len(ids)) for name, value in total.items()}
