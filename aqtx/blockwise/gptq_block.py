"""Round the planned matrices of one block by GPTQ, in waves, within a memory budget.

Experts are taken in quanta: as many consecutive ones as one batch of the solver should hold, by their
shape alone. A budget decides only how many quanta share a run over the calibration text, never
what is solved together, so the codes do not depend on how much memory happened to be free.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner, Stage, Want, waves_of
from aqtx.blockwise.input_moments import Moments
from aqtx.errors import InputError
from aqtx.formats import QuantizedTensor, kernel, parse
from aqtx.formats.codec import check_finite
from aqtx.machine.memory import release_unused
from aqtx.numerics.gptq import Curvature, Options, Solution
from aqtx.numerics.shrinkage import pooled_prior
from aqtx.program.blocks import Block, Values
from aqtx.program.gate_scores import find_gate_scores, is_inside_experts
from aqtx.program.outer_scale import largest_under_one_scale
from aqtx.program.program import Program
from aqtx.program.site import Site

Prior = Literal["none", "isotropic", "pooled"]
POWERS = {"none": 0, "score": 1, "squared_score": 2}
SOLVE_BYTES = {"cpu": 32 << 20, "cuda": 4 << 30}  # workspace of one batch; on a CPU it stays in the cache
SHARES = 8  # a stage's experts are at least so many quanta, for ranks to share, whatever their number
POOL_STRIDE = 4  # the pooled moment is of every fourth row


@dataclass(frozen=True)
class Settings:
    """How a block is rounded; `budget` is in bytes, for moments and solver together."""

    solver: Options
    prior: Prior = "pooled"
    weighting: str = "none"
    rounded_inputs: bool = True
    budget: int = 1 << 30


@dataclass(frozen=True)
class Unit:
    """A quantum of a stage's experts: their moments are collected and used together."""

    stage: Stage
    experts: list[int]
    num_bytes: int

    @property
    def first_site(self) -> str:
        """For messages."""
        return next(iter(self.stage.sites.values()))[0].name


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Problems found inside name the place."""
    try:
        yield
    except InputError as error:
        raise InputError(*(f"{place}: {problem}" for problem in error.problems)) from error


@dataclass
class Rounded:
    """What became of some matrices: their codes, the report's rows, and the range of each input channel by weight."""

    codes: dict[str, QuantizedTensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    channels: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "Rounded") -> None:
        """Take over another's, which may be of the same weights' other experts."""
        self.codes.update(other.codes)
        self.rows += other.rows
        for weight, largest in other.channels.items():
            known = self.channels.get(weight, largest)
            self.channels[weight] = torch.maximum(known, largest.to(known.device))

    def to_send(self) -> "Rounded":
        """The same on the CPU; a code is a part of its batch: without a copy the whole batch would go with each."""
        codes = {name: code.clone() for name, code in self.codes.items()}
        return Rounded(codes, self.rows, {name: largest.cpu() for name, largest in self.channels.items()})


@dataclass(frozen=True)
class BlockRounder:
    """Rounds blocks of one program."""

    runner: Runner
    settings: Settings

    def round(self, block: Block, weights: Values, sites: list[Site]) -> Rounded:
        """Codes for all `sites` of the block go to the program, their values into `weights`; what is to be told."""
        told, ranks = Rounded(), self.runner.ranks
        for wave in waves_of(block, sites):
            units = [unit for stage in wave for unit in self._units(stage)]
            priors: dict[int, Tensor] = {}
            for run in pack(units, self.settings.budget):
                moments, mine = self._collect(block, weights, run, priors), Rounded()
                for place, (unit, found) in enumerate(zip(run, moments, strict=True)):
                    if ranks.owns(place):
                        mine.add(self._round_unit(unit, found, priors.get(id(unit.stage)), weights))
                    found.H = found.H.new_empty(0)
                    release_unused()  # the solver's squares, before the next unit makes its own
                in_run = [site for unit in run for part in unit.stage.sites.values() for site in part]
                told.add(self._exchange(mine, weights, in_run))
        return replace(told, codes={})

    def _units(self, stage: Stage) -> list[Unit]:
        """A stage's experts in quanta of consecutive numbers."""
        rows = max(site.shape[0] for sites in stage.sites.values() for site in sites)
        columns = stage.num_inputs
        each = solver_bytes(rows, columns)
        quantum = max(SOLVE_BYTES.get(self.runner.device.type, SOLVE_BYTES["cpu"]) // each, 1)
        quantum = min(quantum, -(-len(stage.experts) // SHARES))
        units: dict[int, list[int]] = {}
        for expert in stage.experts:
            units.setdefault(expert // quantum, []).append(expert)
        return [Unit(stage, experts, len(experts) * (each + 4 * columns**2)) for experts in units.values()]

    def _collect(self, block: Block, weights: Values, run: list[Unit], priors: dict[int, Tensor]) -> list[Moments]:
        """Moments of the units; a stage met for the first time leaves its pooled moment in `priors`."""
        wanted, pools = [], []
        for unit in run:
            stage, device = unit.stage, self.runner.device
            power, scores = POWERS[self.settings.weighting], None
            if power and stage.offsets is not None:
                scores = find_gate_scores(stage.offsets, block.nodes, power)
            wanted.append(Want(stage, Moments.empty(unit.experts, stage.num_inputs, device), scores))
            if self.settings.prior == "pooled" and id(stage) not in priors and pools_well(stage, block):
                pool = Want(stage, Moments.empty([0], stage.num_inputs, device), scores, POOL_STRIDE)
                priors[id(stage)] = pool.moments.H
                pools.append(pool)
        self.runner.collect(block, weights, wanted + pools)
        for pool in pools:
            priors[id(pool.stage)] = pooled_prior(pool.moments.H[0], pool.moments.tokens[0])
        return [want.moments for want in wanted]

    def _round_unit(self, unit: Unit, moments: Moments, prior: Tensor | None, weights: Values) -> Rounded:
        """Solve the unit's experts, all nodes that read the same moments with one factor."""
        tokens = None if self.settings.prior == "none" else moments.tokens
        solver, rounded = self.settings.solver, Rounded()
        with naming(f"inputs of {unit.first_site}"):
            curvature = Curvature.of(moments.H, num_tokens=tokens, prior=prior, options=solver)
        for sites in unit.stage.sites.values():
            batches: dict[str, list[Site]] = {}
            for site in sites:
                if (site.expert or 0) in moments.place:
                    batches.setdefault(site.get("format"), []).append(site)
            for batch in batches.values():
                rounded.add(self._round_batch(batch, moments, curvature, weights))
        return rounded

    def _round_batch(self, sites: list[Site], moments: Moments, curvature: Curvature, weights: Values) -> Rounded:
        """Solve experts of one node and format, and compute with their codes from now on."""
        program, parameter = self.runner.program, sites[0].node.args[1]
        assert isinstance(parameter, fx.Node)
        stack = weights[parameter] if sites[0].expert is not None else weights[parameter].unsqueeze(0)
        experts = [site.expert or 0 for site in sites]
        places = [moments.place[expert] for expert in experts]
        part = curvature if len(places) == len(moments.H) else curvature.take(places)
        W = torch.stack([program.read(site) for site in sites])  # float32: `stack` has rounded what passes changed
        for site, one in zip(sites, W, strict=True):
            with naming(site.name):
                check_finite(one)
        found = part.solve(W.to(stack.device), parse(sites[0].get("format")), largest=_shared(program, sites, W))
        rounded = Rounded(rows=self._rows(sites, moments, found), channels={sites[0].weight: moments.largest})
        for index, site in enumerate(sites):
            code = found.tensor[index].to(program.dtype)
            rounded.codes[site.name] = code.to("cpu")
            if self.settings.rounded_inputs:
                stack[experts[index]] = values_of(code, stack.dtype)
        return rounded

    def _exchange(self, mine: Rounded, weights: Values, sites: list[Site]) -> Rounded:
        """Take over what other ranks solved; rows come in the order of `sites` on all of them."""
        ranks, known, every = self.runner.ranks, set(mine.codes), Rounded()
        for part in ranks.gather(mine.to_send()) if ranks.size > 1 else [mine]:
            every.add(part)
        every.codes.update(mine.codes)
        order = {site.name: place for place, site in enumerate(sites)}
        every.rows.sort(key=lambda row: order[row["site"]])
        self.runner.program.codes.update(every.codes)
        if self.settings.rounded_inputs:
            take_codes(every.codes, weights, [site for site in sites if site.name in every.codes.keys() - known])
        return every

    def _rows(self, sites: list[Site], moments: Moments, found: Solution) -> list[dict[str, Any]]:
        """Rows of the report."""
        asked = self.settings.solver.damp_fraction
        rows = []
        for index, site in enumerate(sites):
            power, damping = float(found.power[index]), float(found.damping[index])
            raised = damping > asked * 1.001
            tokens = float(moments.tokens[moments.place[site.expert or 0]])
            rows.append(
                {
                    "site": site.name,
                    "tokens": round(tokens, 1) if tokens % 1 else int(tokens),
                    "damping": damping if raised else asked,
                    "damping_raised": damping - asked if raised else 0.0,
                    "shrinkage": float(found.pseudo_tokens[index]),
                    "error_before": float(found.nearest_error[index]) / power if power else 0.0,
                    "error_after": float(found.error[index]) / power if power else 0.0,
                    "rows_nearest": int(found.rows_nearest[index]),
                }
            )
        return rows


def _shared(program: Program, sites: list[Site], W: Tensor) -> Tensor | None:
    """What NVFP4's scales of W [E, N, K] are for [E, 1, 1], where the plan has matrices share one."""
    if not any(site.get("outer_scale") for site in sites):
        return None
    every = {site.name: site for site in program.sites()}
    found = [largest_under_one_scale(program, site, every) for site in sites]
    own = W.abs().amax((-2, -1), keepdim=True)
    return torch.stack([one if most is None else most for one, most in zip(own, found, strict=True)])


def solver_bytes(rows: int, columns: int) -> int:
    """What the solver takes for one matrix [rows, columns] at most, its moments left out."""
    return 4 * (14 * rows * columns + 4 * columns**2)


def take_codes(codes: Mapping[str, QuantizedTensor], weights: Values, sites: list[Site]) -> None:
    """Put the values of some sites' codes into a block's weights."""
    for site in sites:
        parameter = site.node.args[1]
        assert isinstance(parameter, fx.Node)
        target = weights[parameter] if site.expert is None else weights[parameter][site.expert]
        target.copy_(values_of(codes[site.name], target.dtype))


def values_of(code: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """What `code.dequantize(dtype)` gives, from the compiled kernel where there is one."""
    if code.format.is_packed and kernel.decodes(code.format) and kernel.serves(code.device):
        return kernel.dequantize(code.qdata, code.scales, code.format, code.num_columns, dtype)
    return code.dequantize(dtype)


def pools_well(stage: Stage, block: Block) -> bool:
    """Whether a stage's experts draw their inputs from one distribution."""
    return stage.offsets is not None and not is_inside_experts(stage.source, stage.offsets, block.nodes)


def pack(units: list[Unit], budget: int) -> list[list[Unit]]:
    """Runs of consecutive units that fit into the budget together.

    Raises:
        InputError: one unit alone does not fit.
    """
    runs: list[list[Unit]] = []
    left = 0
    for unit in units:
        if unit.num_bytes > budget:
            name = unit.first_site
            need, have = unit.num_bytes / 2**20, max(budget, 0) / 2**20
            raise InputError(f"{name} needs {need:.0f} MiB of memory, {have:.0f} MiB are left for it: raise max_memory")
        if not runs or unit.num_bytes > left:
            runs.append([])
            left = budget
        runs[-1].append(unit)
        left -= unit.num_bytes
    return runs
