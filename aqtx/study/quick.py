"""Is alpha right for this model? An answer before the study: alpha against Fisher information on the model's own text.

No data and no held-out truth: the model writes some text, one backward pass per sequence tells how far rounding each
matrix would move its predictions, and the two orders of the matrices are compared. Fisher information on own text
orders matrices nearly as rounding them one at a time does; what two halves of the text agree on tells how much of the
order so little text can settle.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aqtx.errors import InputError
from aqtx.numerics.intervals import Interval, rank_correlation
from aqtx.planning.method import METHODS
from aqtx.planning.options import divide
from aqtx.planning.settings import Settings
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.opening import own_writer
from aqtx.sensitivity.fisher import losses_along
from aqtx.sensitivity.measured import error_table, measure, requests, values
from aqtx.text.calibration_spec import CalibrationSpec

SPEC = CalibrationSpec(source="self", num_sequences=32, sequence_length=128)
_USEFUL = 0.5  # a rank correlation above it is worth a plan


@dataclass(frozen=True)
class Quick:
    """Rank correlations with Fisher information on own text, over matrices rounded to one format."""

    plan: Interval  # of what method alpha charges
    itself: Interval  # of alpha turned around, with the information per unit of squared error
    error: Interval  # of the squared error alone
    halves: float  # of the information on one half of the text with that on the other
    num_sites: int
    format: str
    seconds: float

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        low, high = self.plan.low or 0.0, self.plan.high or 0.0
        if low > _USEFUL:
            word = "Alpha orders the matrices much as the model itself does; the whole study tells what that is worth."
        elif high < 0:
            word = "Alpha points the wrong way on this model: plan by `fisher`."
        elif high < _USEFUL:
            word = "Alpha is not to be trusted on this model: plan by `fisher`."
        else:
            word = "This leaves open whether alpha is worth a plan on this model; the whole study tells."
        return (
            f"Plans by alpha rank {self.num_sites} matrices in {self.format} with a correlation of {_told(self.plan)} "
            f"to Fisher information on the model's own text ({SPEC.num_sequences * SPEC.sequence_length:,} tokens, "
            f"whose halves agree by {self.halves:.2f}). {word} Low alpha against information per unit of error: "
            f"{_told(self.itself)}; squared error alone: {_told(self.error)}."
        )

    def to_json(self) -> dict[str, Any]:
        """For study.json."""
        intervals = {name: getattr(self, name).to_json() for name in ("plan", "itself", "error")}
        facts = {name: getattr(self, name) for name in ("halves", "num_sites", "format", "seconds", "sentence")}
        return {**intervals, **facts}


def quick_verdict(program: Program, settings: Settings, context: Context, start: list[int]) -> Quick:
    """Compare the two orders over the sites that settings plan and that have an alpha; annotates no sensitivity.

    Args:
        program: annotated with alpha.
        settings: their smallest candidate is the format.
        context: whose seed draws the text; nothing of it is kept.
        start: what the model's tokenizer puts before every text.

    Raises:
        InputError: fewer than three sites have an alpha.
    """
    started = time.perf_counter()
    sites = [site for site in divide(program, settings, measured=False).planned if site.get("alpha") is not None]
    if len(sites) < 3:
        raise InputError(f"{len(sites)} of the planned matrices have an alpha: too few to rank")
    fmt = settings.formats[0]
    wanted = requests(sites, [fmt])
    ids = own_writer(program, SPEC, context, start).text(None, context.progress)
    measure(program, wanted)
    found = losses_along(program, wanted, ids, context)
    losses = torch.stack([found[site.name][0] for site in sites])  # [sites, sequences]
    fisher = losses.mean(1).numpy()
    alpha = Settings(method="alpha", average_bits=8.0)
    cost = METHODS["alpha"].cost
    assert cost is not None
    charged = cost(sites, [fmt], alpha.own, context.seed)[:, 0].numpy()
    error = error_table(sites, [fmt])[:, 0].numpy()
    halves = [losses[:, part::2].mean(1).numpy() for part in (0, 1)]
    return Quick(
        plan=rank_correlation(charged, fisher, seed=context.seed),
        itself=rank_correlation(-values(sites, "alpha").numpy(), fisher / np.maximum(error, 1e-300), seed=context.seed),
        error=rank_correlation(error, fisher, seed=context.seed),
        halves=rank_correlation(*halves, seed=context.seed).value,
        num_sites=len(sites),
        format=fmt.name,
        seconds=round(time.perf_counter() - started, 1),
    )


def _told(value: Interval) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
