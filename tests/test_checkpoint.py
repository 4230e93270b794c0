"""Write and load: bit-equal logits, truthful sizes, equal bytes, and nothing saved that is not finished."""

import json

import pytest
import torch

import aqtx
from aqtx.errors import InputError
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize
from aqtx.program.accounting import account
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from tests.tiny import write_checkpoint

IDS = torch.randint(0, 192, (2, 9), generator=torch.Generator().manual_seed(1))
FORMATS = ["mxfp4", "int4", "mxfp6", "mxfp8", "bf16", "int3_g64_asym", "nvfp4"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A program whose experts carry seven formats within one layer."""
    program = aqtx.trace(write_checkpoint(tmp_path_factory.mktemp("source") / "model"))
    for place, site in enumerate(program.sites()):
        if site.category not in ("router", "lm_head"):
            site.set("format", FORMATS[place % len(FORMATS)])
    program.history.append("assign_plan")
    Run(program, Context()).execute([Quantize(), Emit()])
    return program


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    return aqtx.save(quantized, tmp_path_factory.mktemp("saved") / "model")


def logits(program):
    with torch.no_grad():
        return program.module()(IDS)


def test_loaded_logits_are_bit_equal(quantized, saved):
    assert torch.equal(logits(aqtx.load(saved)), logits(quantized))


def test_emitted_and_simulated_weights_agree(quantized):
    packed = logits(quantized)
    quantized.emitted = False
    simulated = logits(quantized)
    quantized.emitted = True
    # bf16 outputs: a different order of the float32 sums moves a result by at most a few units in the last place
    assert (packed - simulated).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * simulated.abs().max()


def test_saving_a_loaded_program_gives_the_same_bytes(saved, tmp_path):
    again = aqtx.save(aqtx.load(saved), tmp_path / "again")
    names = sorted(path.name for path in saved.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((saved / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_bits_and_bytes_agree_with_the_file(quantized, saved):
    counts = account(quantized, [])
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == counts.bytes_after
    assert counts.model_bits == counts.bytes_after * 8 / counts.elements["total"]
    assert sum(counts.elements[fate] for fate in ("quantized", "kept", "refused")) == counts.elements["total"]
    assert sum(counts.sites[fate] for fate in ("quantized", "kept", "refused")) == counts.sites["total"] == 35


def test_a_folder_with_files_is_not_overwritten(quantized, saved):
    with pytest.raises(InputError, match="is not empty"):
        aqtx.save(quantized, saved)


def test_codes_that_were_not_emitted_are_not_saved(tmp_path):
    program = aqtx.trace(write_checkpoint(tmp_path / "source"))
    program.sites()[0].set("format", "int8")
    program.history.append("assign_plan")
    Run(program, Context()).execute([Quantize()])
    with pytest.raises(InputError, match="add `emit` as the last pass"):
        aqtx.save(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_emit_names_a_planned_site_without_codes(tmp_path):
    program = aqtx.trace(write_checkpoint(tmp_path / "source"))
    program.sites()[0].set("format", "int8")
    with pytest.raises(
        InputError, match=r"passes\.0\.emit: 1 planned sites have no codes yet, first .*q_proj \(int8\)"
    ):
        Run(program, Context()).execute([Emit()])


def test_a_nan_weight_is_refused_by_name(tmp_path):
    weight = torch.ones(128, 128, dtype=torch.bfloat16)
    weight[3, 5] = float("nan")
    name = "model.layers.1.self_attn.q_proj"
    program = aqtx.trace(write_checkpoint(tmp_path / "source", **{f"{name}.weight": weight}))
    next(site for site in program.sites() if site.name == name).set("format", "mxfp4")
    program.history.append("assign_plan")
    with pytest.raises(InputError, match=rf"{name}: .*3, 5"):
        Run(program, Context()).execute([Quantize()])


def test_a_missing_tensor_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"experts\.2\.up_proj\.weight is missing"):
        aqtx.trace(folder)
