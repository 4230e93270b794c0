"""Experts dropped whole: a plan at equal bytes that may leave experts out, against the plan that keeps them all.

    python -m benchmarks.dropped_experts                         # the shipped model at 2.5, 3 and 3.5 bits

A dropped expert takes no bytes, and its router entry is masked, so that the others share its tokens, with their weights
normalized as the model does. Its cost is the divergence measured with it alone masked, on 16 of the 64 calibration
sequences; those of formats are Fisher information on all 64. The plan is the exact optimum over both, with at most
a quarter of a layer's experts dropped, its cheapest. GPTQ rounds the masked model on the 64 sequences; losses and
divergences from the whole, unrounded model are of 100,000 held-out tokens. Finished steps stay in OUT/dropped_experts/.
"""

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aqtx
from aqtx.evaluate.divergence import divergence_of
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.evaluate.statistics import paired_change
from aqtx.numerics.allocate import allocate
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.passes.assign_plan import AssignPlan
from aqtx.planning.options import divide
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.sensitivity.fisher import measure_fisher
from aqtx.sensitivity.measured import requests, table
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import calibration, load_tokenizer
from benchmarks.arms import file_of, measured
from benchmarks.plan_scores import score_plan

Found = dict[str, Any]
Dropped = Sequence[tuple[int, int]]  # (layer, expert)
CANDIDATES = ("int2", "int3", "mxfp4", "mxfp6", "mxfp8")
SEQUENCES, TRIED, LENGTH, BATCH = 64, 16, 256, 4
SHARE = 0.25  # of a layer's experts that may be dropped
ATEN = torch.ops.aten


def opened(model: str, dropped: Dropped = ()) -> tuple[Program, Context]:
    """The model with some experts masked, and a context with the calibration text."""
    program = aqtx.trace(model)
    assert program.folder is not None
    ids = calibration(CalibrationSpec(num_sequences=SEQUENCES, sequence_length=LENGTH), load_tokenizer(program.folder))
    routers = {site.layer: site.node for site in program.sites() if site.category == "router"}
    for layer, expert in dropped:
        logits = routers[layer]
        graph = logits.graph
        with graph.inserting_after(logits):
            entry = graph.call_function(ATEN.select.int, (logits, -1, expert))
        with graph.inserting_after(entry):
            never = graph.call_function(ATEN.full_like.default, (entry, -1e9))
        with graph.inserting_after(never):
            masked = graph.call_function(ATEN.select_scatter.default, (logits, never, -1, expert))
        for node, like in ((entry, logits.meta["val"].select(-1, expert)), (masked, logits.meta["val"])):
            node.meta["val"] = like
        never.meta["val"] = entry.meta["val"]
        logits.replace_all_uses_with(masked, delete_user_cb=lambda user, own=(entry, masked): user not in own)
    return program, Context(quiet=True, load_calibration=lambda: ids)


def drop_costs(model: str) -> Found:
    """Nats per token that each expert's absence moves predictions: {"layer expert": KL}."""
    whole, context = opened(model)
    ids = context.calibration()[:TRIED]
    experts = sorted({(site.layer, site.expert) for site in whole.sites() if site.expert is not None})
    costs = {}
    with torch.no_grad():
        forward = whole.module()
        reference = [forward(rows) for rows in ids.split(BATCH)]
        for layer, expert in context.progress(experts, description="drop"):
            masked = opened(model, [(layer, expert)])[0].module()
            total = sum(
                float(divergence_of(p.flatten(0, 1), q.flatten(0, 1)))
                for p, q in zip(reference, map(masked, ids.split(BATCH)), strict=True)
            )
            costs[f"{layer} {expert}"] = total / ids.numel()
    return costs


def plans(model: str, folder: Path, budgets: Sequence[float]) -> Found:
    """{"BITS whole" and "BITS drop": the formats by site, the experts dropped, and the loss foretold}."""
    program, context = opened(model)
    settings = AssignPlan(candidates=CANDIDATES, average_bits=4.0, fisher_sequences=SEQUENCES)
    sites = divide(program, settings).planned
    measure_fisher(program, requests(sites, settings.formats), context, num_sequences=SEQUENCES)
    costs = table(sites, settings.formats, "fisher").tolist()
    sizes = [[fmt.num_bytes(site.shape) for fmt in settings.formats] for site in sites]
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, site in enumerate(sites):
        assert site.layer is not None and site.expert is not None
        members[site.layer, site.expert].append(row)
    names = [fmt.name for fmt in settings.formats]
    choices = list(itertools.product(range(len(names)), repeat=3))
    told = json.loads(file_of(folder, "drop costs").read_text())
    cost, size = [], []
    for (layer, expert), rows in members.items():
        cost.append([sum(costs[row][i] for row, i in zip(rows, choice, strict=True)) for choice in choices])
        size.append([sum(sizes[row][i] for row, i in zip(rows, choice, strict=True)) for choice in choices])
        cost[-1].append(told[f"{layer} {expert}"])
        size[-1].append(0.0)
    weights = sum(site.numel for site in sites)
    found = {}
    for bits, arm in itertools.product(budgets, ("whole", "drop")):
        may = _cheapest(told) if arm == "drop" else set()
        allowed = [[True] * len(choices) + [key in may] for key in members]
        best = allocate(cost, size, bits * weights / 8, exact=True, allowed=allowed)
        found[f"{bits:g} {arm}"] = _told(sites, members, names, choices, best.choice.tolist()) | {
            "foretold": best.cost,
            "bits": best.size * 8 / weights,
        }
    return found


def _cheapest(told: dict[str, float]) -> set[tuple[int, int]]:
    layers: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for name, cost in told.items():
        layer, expert = map(int, name.split())
        layers[layer].append((cost, expert))
    return {(layer, expert) for layer, rows in layers.items() for _, expert in sorted(rows)[: int(SHARE * len(rows))]}


def _told(
    sites: list[Site],
    members: dict[tuple[int, int], list[int]],
    names: list[str],
    choices: list[tuple[int, ...]],
    chosen: list[int],
) -> Found:
    formats, dropped = {}, []
    for (key, rows), index in zip(members.items(), chosen, strict=True):
        if index == len(choices):
            dropped.append(key)
            continue
        formats |= {sites[row].name: names[i] for row, i in zip(rows, choices[index], strict=True)}
    return {"formats": formats, "dropped": dropped}


def score(model: str, folder: Path, arm: str, tokens: int) -> Found:
    """Losses and divergences of each document."""
    plan = json.loads(file_of(folder, "plans").read_text())[arm]
    program, context = opened(model, plan["dropped"])
    return score_plan(program, context, plan["formats"], tokens)


def main() -> None:
    """Run what is missing, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 3.5])
    parser.add_argument("--tokens", type=int, default=100_000, help="of held-out text (default: 100,000)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.out / "dropped_experts" / Path(arguments.model).name
    measured(folder, {"drop costs": partial(drop_costs, arguments.model)})
    told = measured(folder, {"plans": partial(plans, arguments.model, folder, arguments.bits)})["plans"]
    found = measured(folder, {arm: partial(score, arguments.model, folder, arm, arguments.tokens) for arm in told})
    print("| bits | experts dropped | KL, thousandths of a nat | less that of the whole | change of loss |")
    print("|---|---|---|---|---|")
    for bits, arm in itertools.product(arguments.bits, ("whole", "drop")):
        plan, own = told[f"{bits:g} {arm}"], DocumentScores.from_json(found[f"{bits:g} {arm}"]["divergence"])
        cells = [f"{plan['bits']:.3f}", str(len(plan["dropped"])), f"{1000 * own.mean:.2f}", "", ""]
        if arm == "drop":
            whole = found[f"{bits:g} whole"]
            difference = bootstrap_ratio(
                1000 * (own.nll - DocumentScores.from_json(whole["divergence"]).nll), own.num_tokens
            )
            losses = [DocumentScores.from_json(row["loss"]) for row in (whole, found[f"{bits:g} drop"])]
            cells[3] = interval(difference.to_json(), 2, signed=True)
            cells[4] = interval(paired_change(*losses).to_json(), 4, signed=True)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
