"""Sensitivities against plain computations of the same quantities, and the methods built on them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import aqtx
from aqtx.errors import InputError
from aqtx.formats import Format, fake_quantize, parse
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.annotate_fisher import AnnotateFisher
from aqtx.passes.annotate_hessian import AnnotateHessian
from aqtx.passes.annotate_trial import AnnotateTrial
from aqtx.passes.assign_plan import AssignPlan
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.alpha import robust_z
from aqtx.sensitivity.calibrated import fit, fit_line
from aqtx.sensitivity.rounded_model import RoundedModel, mean_loss
from tests.tiny import write_checkpoint

FORMATS = ("int3", "mxfp4")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return aqtx.trace(write_checkpoint(tmp_path_factory.mktemp("sensitivity") / "model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def context() -> Context:
    ids = torch.randint(0, 192, (4, 24), generator=torch.Generator().manual_seed(1))
    return Context(quiet=True, load_calibration=lambda: ids)


@pytest.fixture(scope="module")
def measured(program: Program, context: Context) -> Program:
    AnnotateAlpha().run(program, context)
    AnnotateHessian(formats=FORMATS).run(program, context)
    AnnotateFisher(formats=FORMATS, num_sequences=3).run(program, context)
    AnnotateFisher(formats=FORMATS, num_sequences=3, detail="element").run(program, context)
    AnnotateTrial(formats=("int3",), measure="loss").run(program, context)
    return program


class Spy(fx.Interpreter):
    """Keeps the arguments of every node that multiplies with a weight."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, list[Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        args = self.fetch_args_kwargs_from_env(n)[0]
        if (
            n.op == "call_function"
            and len(n.args) > 1
            and isinstance(n.args[1], fx.Node)
            and n.args[1].op == "get_attr"
        ):
            self.seen[str(n.args[1].target)] = list(args)
        return super().run_node(n)


def inputs_of(program: Program, site: Site, ids: Tensor) -> Tensor:
    """The rows that a site multiplies with, all sequences at once."""
    spy = Spy(program.module())  # type: ignore[arg-type]
    with torch.no_grad():
        spy.run(ids)
    x, *rest = spy.seen[site.weight]
    x = x.flatten(0, -2)
    if site.expert is None:
        return x
    ends = [0, *rest[1].tolist()]
    return x[ends[site.expert] : ends[site.expert + 1]]


def error_of(program: Program, site: Site, fmt: Format) -> Tensor:
    W = program.read(site)
    return W - fake_quantize(W, fmt)


def test_hessian_weighs_errors_by_the_inputs(measured: Program, context: Context) -> None:
    ids = context.calibration()
    for site in measured.sites()[3::8]:
        x = inputs_of(measured, site, ids)
        for name in FORMATS:
            diagonal = (x.square().sum(0) / ids.numel() * error_of(measured, site, parse(name)).square()).sum()
            assert site.get("hessian")[name] == pytest.approx(float(diagonal), rel=1e-4), site.name
        if site.expert is not None:
            assert site.get("frequency") == pytest.approx(len(x) / ids.numel())


def test_routing_adds_up(measured: Program) -> None:
    """Two of four experts per token; their gate scores are softmax probabilities and sum to less than 1."""
    experts = [
        site for site in measured.sites() if site.name.startswith("model.layers.0.mlp.experts.") and "up" in site.name
    ]
    assert sum(site.get("frequency") for site in experts) == pytest.approx(2.0)
    assert 0.5 < sum(site.get("gate_weight") for site in experts) <= 1.0
    dense = next(site for site in measured.sites() if site.name == "lm_head")
    assert (dense.get("frequency"), dense.get("gate_weight")) == (1.0, 1.0)


def mean_squared_gradient(program: Program, weight: str, sequences: Tensor) -> Tensor:
    """Of one token's loss, from the gradients of whole sequences' mean losses."""
    module = program.module()
    W = module.get_parameter(weight)
    W.requires_grad_(True)
    squares = torch.zeros_like(W)
    for ids in sequences:
        logits = module(ids[None])[0]
        count = len(ids) - 1
        loss = sum(-logits[t].log_softmax(-1)[ids[t + 1]] for t in range(count)) / count
        [gradient] = torch.autograd.grad(loss, W)
        squares += gradient.square()
    return count * squares / len(sequences)


def test_the_fisher_diagonal_is_the_mean_squared_gradient_of_a_token(measured: Program, context: Context) -> None:
    sites = {site.name: site for site in measured.sites()}
    site = sites["model.layers.1.mlp.experts.2.up_proj"]
    F = mean_squared_gradient(measured, site.weight, context.calibration()[:3])[2]
    expected = float(0.5 * (F * error_of(measured, site, parse("int3")).square()).sum())
    assert site.get("fisher_element")["int3"] == pytest.approx(expected, rel=1e-3)


def test_fisher_per_matrix_takes_the_mean(program: Program, context: Context) -> None:
    fresh = aqtx.trace(program.folder or "", dtype=torch.float32)
    AnnotateFisher(formats=("int3",), num_sequences=2, detail="matrix", sites=("lm_head",)).run(fresh, context)
    site = next(site for site in fresh.sites() if site.name == "lm_head")
    squares = mean_squared_gradient(fresh, site.weight, context.calibration()[:2])
    expected = float(0.5 * squares.mean() * error_of(fresh, site, parse("int3")).square().sum())
    assert site.get("fisher_matrix")["int3"] == pytest.approx(expected, rel=1e-3)


def test_fisher_along_errors_is_the_curvature_of_the_divergence(program: Program) -> None:
    """1/2 D^T F D is half the variance, under the model's predictions, of the logits' change along D.

    An estimate from n sequences is off by sqrt(2 / n), 9 % for 256; over sites it averages out.
    """
    ids = torch.randint(0, 192, (4, 24), generator=torch.Generator().manual_seed(3))
    fresh = aqtx.trace(program.folder or "", dtype=torch.float32)
    step = AnnotateFisher(formats=FORMATS, num_sequences=256)
    step.run(fresh, Context(quiet=True, load_calibration=lambda: ids.repeat(64, 1)))
    module, ratios = fresh.module(), []
    for site in fresh.sites()[2::3]:
        W, D = module.get_parameter(site.weight), -error_of(fresh, site, parse("mxfp4"))
        place = () if site.expert is None else (site.expert,)
        logits = []
        for step_size in (0.1, -0.1, 0.0):  # small, so that no token changes its experts
            moved = W.detach().clone()
            moved[place] += step_size * D
            logits.append(torch.func.functional_call(module, {site.weight: moved}, (ids,)).detach().double())
        slope, p = (logits[0] - logits[1]) / 0.2, logits[2].softmax(-1)
        exact = 0.5 * ((p * slope.square()).sum(-1) - (p * slope).sum(-1).square()).mean()
        ratios.append(site.get("fisher")["mxfp4"] / float(exact))
    assert len(ratios) > 8 and min(ratios) > 0.6 and max(ratios) < 1.5
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.08)


def test_a_trial_is_the_divergence_of_the_rounded_model(measured: Program, context: Context) -> None:
    model, ids = RoundedModel(measured), context.calibration()
    for name in ("model.layers.0.mlp.experts.1.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
        site = next(site for site in measured.sites() if site.name == name)
        with torch.no_grad():
            p = model.use({})(ids).log_softmax(-1)
            q = model.use({name: "int3"})(ids).log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert site.get("trial_loss")["int3"] == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_block_trials_see_their_own_block(program: Program, context: Context) -> None:
    AnnotateTrial(formats=("int3", "int8"), sites=("*.experts.0.down_proj",)).run(program, context)
    for site in program.sites():
        if site.name.endswith("experts.0.down_proj"):
            found = site.get("trial")
            assert 0 < found["int8"] < found["int3"] < 1


def test_the_rounded_model_goes_back(measured: Program, context: Context) -> None:
    model, ids = RoundedModel(measured), context.calibration()
    before = mean_loss(model.use({}), ids)
    changed = mean_loss(model.use({"lm_head": "int2", "model.layers.0.mlp.experts.0.up_proj": "int2"}), ids)
    assert changed != before and mean_loss(model.use({"lm_head": None}), ids) == before
    assert measured.weights.written() == {}


def test_a_rounded_model_that_does_not_fit_runs_block_by_block(measured: Program, context: Context) -> None:
    """The same losses under plans in any order, whether blocks are read again or held."""
    streamed, resident, ids = RoundedModel(measured, room=0), RoundedModel(measured), context.calibration()
    plans = [{}, {"lm_head": "int2"}, {"model.layers.0.mlp.experts.0.up_proj": "int2", "lm_head": "int3"}, {}]
    losses = [[mean_loss(model.use(plan), ids) for plan in plans] for model in (streamed, resident)]
    assert streamed.use({}).streams and not resident.use({}).streams
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] == losses[0][3] and len(set(losses[0])) == 3


def test_robust_z() -> None:
    z = robust_z(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert z[2] == 0 and z[4] == 3 and float(z[3]) == pytest.approx(1 / 1.4826)
    assert robust_z(torch.tensor([5.0, 5.0, 5.0, 9.0])).tolist() == [0, 0, 0, 0]  # MAD 0


def test_fit_line_leaves_one_out() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(12, generator=g, dtype=torch.float64)
    t = 0.5 - 1.3 * z + 0.2 * torch.randn(12, generator=g, dtype=torch.float64)
    line, error, baseline = fit_line(z, t), 0.0, 0.0
    for i in range(12):
        rest = torch.arange(12) != i
        A = torch.stack([torch.ones(11, dtype=torch.float64), z[rest]], 1)
        a, b = torch.linalg.lstsq(A, t[rest]).solution.tolist()
        error += (float(t[i]) - a - b * float(z[i])) ** 2
        baseline += float(t[i] - t[rest].mean()) ** 2
    assert (line.error, line.baseline) == (pytest.approx(error), pytest.approx(baseline))
    assert line.slope == pytest.approx(-1.3, abs=0.2)
    noise = fit_line(z, torch.tensor([1.0, -1.0] * 6, dtype=torch.float64))
    assert noise.slope == 0 and noise.error == noise.baseline


def test_fit_finds_the_variant_and_the_sign_of_each_role() -> None:
    g = torch.Generator().manual_seed(1)
    right, wrong = (torch.randn(40, generator=g, dtype=torch.float64) for _ in range(2))
    roles = ["up", "down"] * 20
    sign = torch.tensor([-1.0, 2.0] * 20, dtype=torch.float64)
    targets = sign * right + 0.1 * torch.randn(40, generator=g, dtype=torch.float64)
    targets[:4] = math.nan
    found = fit({("farms", "a"): wrong, ("full", "b"): right}, targets, roles)
    assert found.variant == ("full", "b") and found.explained > 0.95 and found.num_points == 36
    assert found.lines["up"].slope == pytest.approx(-1, abs=0.1)
    assert "up low alpha = sensitive, down high alpha = sensitive" in found.sentence()
    assert "cannot be trusted" in fit({("farms", "a"): wrong}, torch.rand(40, generator=g).double(), roles).sentence()


METHODS = ("error", "alpha", "alphaq", "hessian", "pmq", "fisher", "trial", "calibrated", "random", "even")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_budget(measured: Program, context: Context, method: str) -> None:
    step = AssignPlan(method=method, candidates=FORMATS, average_bits=3.75, fit_to="trial")  # type: ignore[arg-type]
    assert step.validate() == []
    changes = step.run(measured, context)
    plan = measured.plan
    assert plan is not None and plan.average_bits is not None
    assert plan.average_bits <= 3.75 or method == "alphaq"  # counts nominal bits
    assert {entry.format for entry in plan.planned.values()} == {"int3", "mxfp4"}
    if method == "calibrated":
        assert {"variant", "explained", "sentence"} <= set(changes.details["calibrated"])
        assert changes.details["seconds"] > 0


def test_even_spreads_the_larger_format(measured: Program, context: Context) -> None:
    AssignPlan(method="even", candidates=FORMATS, average_bits=3.78).run(measured, context)
    assert measured.plan is not None
    chosen = [entry.format == "mxfp4" for entry in measured.plan.planned.values()]
    assert sum(chosen[:12]) - sum(chosen[12:]) in (-1, 0, 1) and sum(chosen) == 13


def test_search_stops_at_the_ceiling(measured: Program, context: Context) -> None:
    fields: dict[str, Any] = {"method": "search", "base": "error", "candidates": ("int2", "int3", "mxfp4", "mxfp6")}
    bits = []
    for ceiling in (1.002, 1.02, 2.0):
        changes = AssignPlan(**fields, perplexity_ceiling=ceiling, search_steps=6).run(measured, context)
        tried = changes.details["search"]
        assert measured.plan is not None and measured.plan.average_bits is not None
        bits.append(measured.plan.average_bits)
        accepted = min(row["average_bits"] for row in tried if row["accepted"])
        assert measured.plan.average_bits == pytest.approx(accepted)
        assert all(row["accepted"] == (row["perplexity_ratio"] <= ceiling) for row in tried)
    assert bits == sorted(bits, reverse=True) and bits[-1] == pytest.approx(13 / 6)  # all int2
    with pytest.raises(InputError, match="above perplexity_ceiling"):
        AssignPlan(**fields | {"candidates": ("int2",)}, perplexity_ceiling=1.0).run(measured, context)


def test_annotations_are_not_taken_twice(measured: Program, tmp_path: Path) -> None:
    def refuse() -> Tensor:
        raise AssertionError("calibration text was read again")

    AssignPlan(method="fisher", candidates=FORMATS, average_bits=3.75).run(
        measured, Context(quiet=True, load_calibration=refuse)
    )
