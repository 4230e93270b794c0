"""Plans that GPTQ carries out, compared on held-out text: what each loses, beside one of them at the same bytes."""

from collections.abc import Sequence
from typing import Any

import aqtx
from aqtx.evaluate.divergence import evaluate_divergence
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.evaluate.statistics import paired_change
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.gptq import Gptq
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.report.numbers import interval
from aqtx.runs.pipeline import Run
from aqtx.text.tokens import evaluation, load_tokenizer

Found = dict[str, Any]
WINDOW = 512


def score_plan(program: Program, context: Context, plan: Found, max_tokens: int | None) -> Found:
    """Losses of each document under a plan, and divergences from the model of the same folder as it is."""
    assert program.folder is not None
    original = aqtx.trace(program.folder)
    documents = evaluation("builtin", load_tokenizer(program.folder), max_tokens=max_tokens)
    Run(program, context).execute([AssignPlan(method="manual", plan=plan), Gptq()])
    [found] = evaluate_divergence(original.module(), [program.module()], documents, window=WINDOW)
    return {"loss": found.loss.to_json(), "divergence": found.divergence.to_json()}


def table(found: dict[str, Found], arms: Sequence[str], budgets: Sequence[float], first: str) -> str:
    """Markdown: a row for each budget and arm that is there, the last columns paired with the arm `first`."""
    lines = [
        f"| bits | arm | stored bits | divergence, thousandths of a nat | over that of `{first}` | change of loss "
        f"| change against `{first}` |",
        f"|{'---|' * 7}",
    ]
    before = DocumentScores.from_json(found["model"]["loss"])
    for budget in budgets:
        rows = {arm: found[f"at {budget:g} {arm}"] for arm in arms if f"at {budget:g} {arm}" in found}
        scores = {arm: DocumentScores.from_json(row["divergence"]) for arm, row in rows.items()}
        losses = {arm: DocumentScores.from_json(row["loss"]) for arm, row in rows.items()}
        for arm, row in rows.items():
            own = bootstrap_ratio(1000 * scores[arm].nll, scores[arm].num_tokens)
            cells = [f"{budget:g}", f"`{arm}`", f"{row['bits']:.3f}", interval(own.to_json(), 2)]
            cells += ["", interval(paired_change(before, losses[arm]).to_json(), 4, signed=True), ""]
            if arm != first and first in rows:
                cells[4] = interval(bootstrap_ratio(scores[arm].nll, scores[first].nll).to_json())
                cells[6] = interval(paired_change(losses[first], losses[arm]).to_json(), 4, signed=True)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
