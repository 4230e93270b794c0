"""Tracing: canonical graphs, and sites by checkpoint name."""

from collections import OrderedDict

import torch
from torch import fx

import aqtx
from aqtx.machine import half_products
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize
from aqtx.program import run_ops, trace
from aqtx.program.site import GROUPED_LINEAR, LINEAR
from tests.tiny import OLMOE, random_model, write_checkpoint

IDS = torch.randint(0, 192, (3, 17), generator=torch.Generator().manual_seed(1))


def count(graph: fx.Graph, target: object) -> int:
    return sum(node.target is target for node in graph.nodes)


def test_traced_module_computes_the_same_bits_at_other_sizes_than_traced(monkeypatch):
    monkeypatch.setattr(run_ops, "_IN_PLACE_OF", {})  # or linears are rounded once where the model's are not
    monkeypatch.setattr(half_products, "SLOW", frozenset())
    model = random_model()
    module = aqtx.trace(model).module()
    for ids in (IDS, IDS[:1, :1], IDS[:1]):
        with torch.no_grad():
            assert torch.equal(module(ids), model(ids)), ids.shape


def test_one_node_per_matrix_multiply_and_per_norm():
    graph = aqtx.trace(random_model()).graph
    layers = OLMOE["num_hidden_layers"]
    assert count(graph, GROUPED_LINEAR) == 3 * layers
    assert count(graph, LINEAR) == 5 * layers + 1  # q k v o router, and the head
    assert count(graph, torch.ops.aten.rms_norm.default) == 4 * layers + 1


def test_a_config_is_traced_once_and_no_program_sees_what_was_done_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "_KEPT", OrderedDict())
    traced, export = [], trace.export_entry
    monkeypatch.setattr(trace, "export_entry", lambda model, entry: traced.append(entry) or export(model, entry))
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "other", {**OLMOE, "num_experts_per_tok": 1})
    first = aqtx.trace(tmp_path / "one")
    untouched = first.graph.python_code("self").src
    aqtx.run(first, [AssignPlan(method="uniform", candidates=("int4_g32",)), Quantize(), Emit()])
    first.graph.erase_node(next(node for node in reversed(first.graph.nodes) if node.op == "output"))
    again = aqtx.trace(tmp_path / "one")
    assert again.graph.python_code("self").src == untouched
    assert all(site.get("format") is None for site in again.sites())
    assert torch.equal(again.module()(IDS), aqtx.trace(tmp_path / "one").module()(IDS))
    assert traced == ["score"]
    aqtx.trace(tmp_path / "other")
    aqtx.trace(tmp_path / "one", dtype=torch.float32)
    aqtx.trace(tmp_path / "one").entry("step")
    aqtx.trace(tmp_path / "one").entry("step")
    assert traced == ["score", "score", "score", "step"]


def test_graphs_hold_no_guards_and_no_assertions():
    graph = aqtx.trace(random_model()).graph
    left = [node.format_node() for node in graph.nodes if "assert" in str(node.target) or node.op == "call_module"]
    assert not left


def test_sites_carry_checkpoint_names_roles_and_layers():
    sites = {site.name: site for site in aqtx.trace(random_model()).sites()}
    assert len(sites) == 2 * (5 + 3 * 4) + 1
    expert = sites["model.layers.1.mlp.experts.3.down_proj"]
    assert (expert.category, expert.layer, expert.expert, expert.shape) == ("mlp_down", 1, 3, (128, 64))
    assert sites["model.layers.0.mlp.gate"].category == "router"
    assert sites["lm_head"].layer is None


def test_read_returns_one_expert_as_a_float32_copy():
    model = random_model()
    program = aqtx.trace(model)
    site = next(site for site in program.sites() if site.name.endswith("experts.2.up_proj"))
    matrix = program.read(site)
    assert matrix.dtype is torch.float32
    assert torch.equal(matrix, model.model.layers[0].mlp.experts.up_proj[2].float())
    matrix.zero_()
    assert program.read(site).abs().sum() > 0


def test_annotations_are_lists_over_experts_in_node_metadata():
    program = aqtx.trace(random_model())
    site = next(site for site in program.sites() if site.name.endswith("experts.2.up_proj"))
    site.set("alpha", 3.5)
    assert site.node.meta["custom"]["aqtx"]["alpha"] == [None, None, 3.5, None]
    assert site.get("alpha") == 3.5
