"""The Fisher information F: how far rounding moves the model's predictions, from gradients on calibration text.

Rounding a matrix by D = Q(W) - W changes the predictions by a divergence of about 1/2 D^T F D nats per token, with
F the mean of g g^T over tokens, g the gradient of -ln p(y) and y drawn from the model's own predictions. Three ways:

    direction  D^T F D itself. Labels drawn from the model make the gradients of tokens independent with mean zero,
               so the square of (sum of a sequence's gradients) . D is, on average, the sum of its tokens' squares:
               one backward pass per sequence serves all matrices and formats, and no part of F is left out. The
               gradient itself is never formed: it is sum_t d_t x_t^T, with d_t the loss's gradient for the matrix's
               output and x_t its input, so its product with D is sum_t d_t . (D x_t).
    element    the diagonal only, 1/2 sum F_nk D_nk^2, from the text's own labels: as though errors were independent.
               At two bits they are not: rounding shrinks a matrix along itself, and the diagonal misses it.
    matrix     the diagonal's mean over each matrix.

Annotations: `fisher`, `fisher_element`, `fisher_matrix` {format: nats per token}; of text in several domains, from the
same pass, also by domain: `fisher_domains` and so on. Domains weigh what the text's weights say. One block's weights
are in memory at a time, and the errors or gradients of one matrix; what flows between blocks and the rows x and d of
one block are in memory too where that is a small part of what may be used, else on disk.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from aqtx.blockwise.backward import Backward
from aqtx.blockwise.linear_rows import Rows
from aqtx.errors import InputError
from aqtx.formats import Format, fake_quantize
from aqtx.machine.half_products import matmul
from aqtx.program.program import Program
from aqtx.program.site import Site, weight_node
from aqtx.registry import Calibration, Context
from aqtx.sensitivity.fisher_record import FisherRecord
from aqtx.sensitivity.label_gradients import drawn_labels, given_labels
from aqtx.sensitivity.measured import Request, annotate, has, matrix
from aqtx.sensitivity.text_gradients import text_gradients

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
    text = context.by_domain()[:num_sequences]
    if detail == "direction":
        _measure_directions(program, missing, text, context)
    else:
        _measure_diagonals(program, missing, text, context, detail)


def users_of(program: Program, weights: Sequence[str]) -> dict[str, list[fx.Node]]:
    """The linears that multiply with each of these parameters."""
    found: dict[str, list[fx.Node]] = {name: [] for name in weights}
    for node in program.graph.nodes:
        weight = weight_node(node)
        if weight is not None and str(weight.target) in found:
            found[str(weight.target)].append(node)
    return found


def _by_weight(wanted: Sequence[Request]) -> dict[str, list[Request]]:
    grouped: dict[str, list[Request]] = {}
    for site, formats in wanted:
        grouped.setdefault(site.weight, []).append((site, formats))
    return grouped


def losses_along(
    program: Program,
    wanted: Sequence[Request],
    ids: Tensor,
    context: Context,
    rounded: Sequence[tuple[Site, Format]] = (),
) -> dict[str, Tensor]:
    """1/2 D^T F D of each site, [formats, sequences] in nats per token; annotates nothing.

    A matrix that is used twice has the gradients of both uses added up. F is that of the model as it stands, or with
    some sites `rounded`; D is from the weights as they stand.
    """
    by_weight = _by_weight(wanted)
    users = users_of(program, list(by_weight))
    sums = {site.name: torch.zeros(len(formats), len(ids), dtype=torch.float64) for site, formats in wanted}
    detail = "direction" + "".join(f" {site.name}:{fmt.name}" for site, fmt in rounded)
    with text_gradients(program, users, ids, context, rounded) as backward:
        record = FisherRecord.of(wanted, ids, context, detail)
        done = record.load(sums, backward)
        backward.forward(context.progress, done)
        for block in backward.backward(drawn_labels(backward.sizes, context), context.progress, done):
            for weight, node in _uses(users, block.nodes):
                _add_directions(program, by_weight[weight], node, backward, sums)
            record.save(block.index, sums, backward)
    context.ranks.add_up(*sums.values())  # each sequence is one rank's, zero on the others
    return {name: 0.5 * value.square() / ids.shape[1] for name, value in sums.items()}


def _measure_directions(program: Program, wanted: Sequence[Request], text: Calibration, context: Context) -> None:
    found = losses_along(program, wanted, text.ids, context)
    for site, formats in wanted:
        losses = found[site.name]
        annotate(site, KEYS["direction"], _by_format(formats, (losses * text.shares()).sum(1)))
        for domain in _told_apart(text):
            _annotate_domain(site, KEYS["direction"], domain, _by_format(formats, losses[:, text.rows(domain)].mean(1)))


def _by_format(formats: Sequence[Format], values: Tensor) -> dict[str, float]:
    return {fmt.name: float(value) for fmt, value in zip(formats, values, strict=True)}


def _told_apart(text: Calibration) -> list[str]:
    """The domains of a text, where there are several."""
    return list(text.weights) if len(text.weights) > 1 else []


def _annotate_domain(site: Site, key: str, domain: str, found: dict[str, float]) -> None:
    key = domains_key(key)
    known = site.get(key, {})
    site.set(key, {**known, domain: {**known.get(domain, {}), **found}})


def domains_key(key: str) -> str:
    """The annotation that holds the same by domain of the text."""
    return f"{key}_domains"


def _uses(users: dict[str, list[fx.Node]], nodes: Sequence[fx.Node]) -> list[tuple[str, fx.Node]]:
    among = set(nodes)
    return [(weight, node) for weight, found in users.items() for node in found if node in among]


def _add_directions(
    program: Program, wanted: Sequence[Request], node: fx.Node, backward: Backward, sums: dict[str, Tensor]
) -> None:
    """Add sum_t d_t . (D x_t) of every sequence, for the sites of one node; D is that of one matrix at a time."""
    seen = list(backward.rows_of(node))
    for site, formats in wanted:
        parts = [(batch, rows.of(site.expert)) for batch, rows in seen]
        if not any(len(rows.x) for _, rows in parts):
            continue
        D = _errors(program, site, formats)
        for batch, rows in parts:
            start = sum(backward.sizes[:batch])
            sums[site.name][:, start : start + backward.sizes[batch]] += directional(D, rows, backward.sizes[batch])


def directional(D: Tensor, rows: Rows, num_sequences: int) -> Tensor:
    """sum_t d_t . (D x_t) of each sequence: D [formats, N, K] -> [formats, sequences], float64 on the CPU."""
    found = torch.zeros(len(D), num_sequences, dtype=torch.float64)
    for start in range(0, len(rows.x), ROWS):
        part = slice(start, start + ROWS)
        y = matmul(rows.x[part], D.flatten(0, 1).mT).unflatten(1, D.shape[:2])  # [R, formats, N]
        products = (y * rows.d[part, None]).sum(-1, dtype=torch.float32)
        found.index_add_(1, rows.sequence[part].cpu(), products.double().cpu().mT)
    return found


ROWS = 1024  # multiplied at a time: their products with all formats' errors are the largest tensor here


def _errors(program: Program, site: Site, formats: Sequence[Format]) -> Tensor:
    """Q(W) - W under each format, [formats, N, K]."""
    W = matrix(program, site)
    return torch.stack([(fake_quantize(W, fmt).float() - W.float()).to(program.dtype) for fmt in formats])


def _measure_diagonals(
    program: Program, wanted: Sequence[Request], text: Calibration, context: Context, detail: Detail
) -> None:
    """1/2 sum F_nk D_nk^2 with the diagonal of F, or its mean over the matrix.

    Gradients of single tokens are not to be had cheaply; those of sequences of T tokens are, and as tokens'
    gradients are nearly uncorrelated, F = T mean((gradient of the sequence's mean loss)^2).
    """
    by_weight, ids = _by_weight(wanted), text.ids
    users = users_of(program, list(by_weight))
    twice = [f"{name}: it is used {len(found)} times" for name, found in users.items() if len(found) > 1]
    if twice:
        raise InputError(*(f"{problem}; its Fisher information is known along errors only" for problem in twice))
    losses = {site.name: torch.zeros(max(len(text.weights), 1), len(formats)).double() for site, formats in wanted}
    with text_gradients(program, users, ids[:, :-1], context) as backward:
        record = FisherRecord.of(wanted, ids, context, detail)
        done = record.load(losses, backward)
        backward.forward(context.progress, done)
        for block in backward.backward(given_labels(backward.sizes, ids[:, 1:]), context.progress, done):
            for weight, node in _uses(users, block.nodes):
                seen = list(backward.rows_of(node))
                for site, formats in by_weight[weight]:
                    own = [(sum(backward.sizes[:batch]), rows.of(site.expert)) for batch, rows in seen]
                    losses[site.name].copy_(_diagonal(program, (site, formats), own, (text, detail), context))
            record.save(block.index, losses, backward)
    for site, formats in wanted:
        shares = torch.tensor(list(text.weights.values()) or [1.0], dtype=torch.float64)
        annotate(site, KEYS[detail], _by_format(formats, shares @ losses[site.name]))
        for domain, found in zip(_told_apart(text), losses[site.name], strict=False):
            _annotate_domain(site, KEYS[detail], domain, _by_format(formats, found))


def _diagonal(
    program: Program,
    wanted: Request,
    seen: Sequence[tuple[int, Rows]],
    asked: tuple[Calibration, Detail],
    context: Context,
) -> Tensor:
    """One site's losses [domains, formats]: each sequence's gradient is formed once, and F of one domain is held.

    Args:
        program: the model.
        wanted: the site and its formats.
        seen: rows of each batch, with the number of its first sequence.
        asked: the text, and what to take of the diagonal.
        context: whose ranks add up.
    """
    (site, formats), (text, detail) = wanted, asked
    errors = _errors(program, site, formats).float().square()
    rows = [text.rows(domain) for domain in text.weights] or [torch.ones(len(text.ids), dtype=torch.bool)]
    losses = torch.zeros(len(rows), len(formats), dtype=torch.float64)
    for row, chosen in enumerate(rows):
        F = squared_gradients(site, seen, chosen, context.device)
        context.ranks.add_up(F)
        F /= int(chosen.sum()) * (text.ids.shape[1] - 1)
        F = F.mean() if detail == "matrix" else F
        losses[row] = 0.5 * torch.stack([(F * error).sum(dtype=torch.float64) for error in errors]).cpu()
    return losses


def squared_gradients(site: Site, seen: Sequence[tuple[int, Rows]], chosen: Tensor, device: torch.device) -> Tensor:
    """The squares of each chosen sequence's gradient for a matrix, summed over sequences: [N, K], float32."""
    total = torch.zeros(site.shape, device=device)
    for first, rows in seen:
        for sequence in rows.sequence.unique().tolist():
            if chosen[first + sequence]:
                own = rows.sequence == sequence
                total += (rows.d[own].mT @ rows.x[own]).float().square()
    return total
