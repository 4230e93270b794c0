"""The Fisher information F: how far rounding moves the model's predictions, from gradients on calibration text.

Rounding a matrix by D = Q(W) - W changes the predictions by a divergence of about 1/2 D^T F D nats per token, with
F the mean of g g^T over tokens, g the gradient of -ln p(y) and y drawn from the model's own predictions. Three ways:

    direction  D^T F D itself. Labels drawn from the model make the gradients of tokens independent with mean zero,
               so the square of (sum of a sequence's gradients) . D is, on average, the sum of its tokens' squares:
               one backward pass per sequence serves all matrices and formats, and no part of F is left out.
    element    the diagonal only, 1/2 sum F_nk D_nk^2, from the text's own labels: as though errors were independent.
               At two bits they are not: rounding shrinks a matrix along itself, and the diagonal misses it.
    matrix     the diagonal's mean over each matrix.

Annotations: `fisher`, `fisher_element`, `fisher_matrix` {format: nats per token}. All gradients are resident, and per
weight the errors of all formats in the model's dtype (direction), four bytes (element) or nothing (matrix).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aqtx.formats import Format, fake_quantize
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has, matrix, weighted_errors

Detail = Literal["direction", "element", "matrix"]
KEYS: dict[str, str] = {"direction": "fisher", "element": "fisher_element", "matrix": "fisher_matrix"}


def measure_fisher(
    program: Program,
    wanted: Sequence[Request],
    context: Context,
    *,
    num_sequences: int = 64,
    detail: Detail = "direction",
) -> None:
    """Annotate the sites that lack the information for their formats; without such sites no text is read."""
    missing = [(site, formats) for site, formats in wanted if not has(site, KEYS[detail], formats)]
    if not missing:
        return
    ids = context.calibration()[:num_sequences]
    if detail == "direction":
        _measure_directions(program, missing, ids, context)
        return
    information = _diagonal(program, [site for site, _ in missing], ids, context, per_matrix=detail == "matrix")
    for site, formats in context.progress(missing, description="fisher errors"):
        errors = weighted_errors(program, site, formats, 0.5 * _slice(information[site.weight], site))
        annotate(site, KEYS[detail], errors)


def _measure_directions(program: Program, wanted: Sequence[Request], ids: Tensor, context: Context) -> None:
    """1/2 D^T F D of each site and format."""
    errors = [_errors(program, site, formats) for site, formats in context.progress(wanted, description="rounding")]
    total = [torch.zeros(len(formats), dtype=torch.float64) for _, formats in wanted]
    generator = torch.Generator(program.device).manual_seed(context.seed)
    for gradients in _gradients(
        program,
        [site for site, _ in wanted],
        ids,
        context,
        lambda logits, row: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
    ):
        for (site, _), D, sums in zip(wanted, errors, total, strict=True):
            sums += (D @ _slice(gradients[site.weight], site).flatten()).double().cpu().square()
    for (site, formats), sums in zip(wanted, total, strict=True):
        losses = 0.5 * sums / ids.numel()
        annotate(site, KEYS["direction"], {fmt.name: float(v) for fmt, v in zip(formats, losses, strict=True)})


def _errors(program: Program, site: Site, formats: Sequence[Format]) -> Tensor:
    """Q(W) - W under each format, [formats, N * K]."""
    W = matrix(program, site)
    return torch.stack([(fake_quantize(W, fmt).float() - W.float()).flatten() for fmt in formats]).to(program.dtype)


def _slice(value: Tensor, site: Site) -> Tensor:
    return value if site.expert is None else value[site.expert]


def _diagonal(
    program: Program, sites: Sequence[Site], ids: Tensor, context: Context, *, per_matrix: bool
) -> dict[str, Tensor]:
    """The diagonal of each parameter's F, or its mean over each matrix [E, 1, 1], [1, 1].

    Gradients of single tokens are not to be had cheaply; those of sequences of T tokens are, and as tokens'
    gradients are nearly uncorrelated, F = T mean((gradient of the sequence's mean loss)^2).
    """
    total: dict[str, Tensor] = {}

    def labels(logits: Tensor, row: int) -> Tensor:
        return ids[row, 1:].to(logits.device)

    for gradients in _gradients(program, sites, ids[:, :-1], context, labels):
        for name, gradient in gradients.items():
            square = gradient.float().square()
            square = square.mean((-2, -1), keepdim=True) if per_matrix else square
            total[name] = square if name not in total else total[name].add_(square)
    return {name: value / (ids.numel() - len(ids)) for name, value in total.items()}


def _gradients(
    program: Program,
    sites: Sequence[Site],
    ids: Tensor,
    context: Context,
    labels: Callable[[Tensor, int], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """For each sequence the gradient, by parameter, of its summed cross-entropy with labels (logits, row) -> [T]."""
    module = program.module()
    parameters = {name: module.get_parameter(name) for name in {site.weight: None for site in sites}}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for row, sequence in enumerate(context.progress(ids.to(program.device), total=len(ids), description="fisher")):
        for parameter in parameters.values():
            parameter.grad = None
        logits = module(sequence[None])[0].float()
        cross_entropy(logits, labels(logits.detach(), row), reduction="sum").backward()
        yield {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in parameters.items()
        }
