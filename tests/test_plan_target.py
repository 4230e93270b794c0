"""`assign_plan: {target: ...}`: what a program fuses or lacks is a constraint of the plan."""

import re

import pytest

import aqtx
from aqtx.checkpoint.exports.clients import CLIENTS
from aqtx.checkpoint.exports.target import captured
from aqtx.passes.assign_plan import AssignPlan
from aqtx.program.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    return aqtx.trace("tinymoe")


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "transformers"])
def test_a_plan_for_a_target_has_one_format_where_it_fuses(target: str) -> None:
    planned = aqtx.trace("tinymoe")
    step = AssignPlan(method="error", target=target, candidates=("int4_g32", "int8_g32", "int6_row"), average_bits=6.0)
    planned = aqtx.run(planned, [step])
    assert planned.plan is not None
    formats = {name: entry.format for name, entry in planned.plan.sites.items()}
    for pattern in CLIENTS[target].alike:
        for members in captured(pattern, formats).values():
            assert len({formats[name] for name in members}) == 1
    assert len({name for name in formats.values() if name}) == (1 if target == "transformers" else 2)
    assert CLIENTS[target].unlike(formats) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target": "vllm", "candidates": ("mxfp4", "mxfp6")}, r"target vllm has no form for mxfp6_e2m3.*is int6"),
        ({"target": "llama.cpp", "candidates": ("mxfp4", "mxfp8")}, r"target llama.cpp has no form for mxfp8.*is int8"),
        ({"target": "llama.cpp", "candidates": ("mxfp4", "nvfp4")}, r"target llama.cpp has no form for nvfp4.*NaN"),
        (
            {"target": "vllm", "candidates": ("int4",), "keep": ("re:experts.3", "attention", "lm_head", "router")},
            r"vllm: the experts of a layer share one format, but",
        ),
    ],
)
def test_what_a_target_forbids_is_told_before_anything_is_measured(keys: dict, says: str, program: Program) -> None:
    problems = AssignPlan(method="error", average_bits=4.5, **keys).misfits(program)
    assert re.search(says, " ".join(problems)), problems


def test_the_budget_counts_what_the_target_loads(program: Program) -> None:
    """INT3 takes 4.5 bits in GGUF, so that 4 bits are too few for it there and enough elsewhere."""
    keys = {"method": "error", "candidates": ("int3",), "average_bits": 4.0}
    assert "is below the smallest possible, 4.5000" in AssignPlan(target="llama.cpp", **keys).misfits(program)[0]
    assert not [p for p in AssignPlan(**keys).misfits(program) if "below" in p]
