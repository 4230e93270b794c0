"""Fisher information one block at a time against the same from the whole model's weight gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import aqtx
from aqtx.formats import fake_quantize, parse
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity import text_gradients as text_gradients_module
from aqtx.sensitivity.fisher import KEYS, Detail, measure_fisher
from aqtx.sensitivity.measured import requests
from aqtx.sensitivity.selection import unique_sites
from tests.marks import slow
from tests.tiny import write_checkpoint

FORMATS = [parse(name) for name in ("int3", "mxfp4", "mxfp8")]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 192,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def context_of(vocabulary: int, sequences: int = 6, length: int = 40) -> Context:
    ids = torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Context(seed=3, quiet=True, load_calibration=lambda: ids)


def resident_gradients(
    program: Program, ids: Tensor, labels: Callable[[Tensor, int], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The oracle: all weights resident, one sequence after the other, autograd for every matrix."""
    module = program.module()
    parameters = {name: module.get_parameter(name) for name in program.sites_by_weight()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for row, sequence in enumerate(ids):
        logits = module(sequence[None])[0].float()
        loss = cross_entropy(logits, labels(logits.detach(), row), reduction="sum")
        found = torch.autograd.grad(loss, list(parameters.values()))
        yield dict(zip(parameters, found, strict=True))


def part(value: Tensor, site: Site) -> Tensor:
    return value if site.expert is None else value[site.expert]


def resident_fisher(program: Program, context: Context, detail: Detail) -> dict[str, list[float]]:
    """Values by site, one for each format."""
    ids, generator = context.calibration(), torch.Generator().manual_seed(context.seed)
    sites, totals = unique_sites(program), dict[str, Tensor]()
    errors = {
        name: torch.stack([fake_quantize(program.read(site), fmt) - program.read(site) for fmt in FORMATS])
        for name, site in sites.items()
    }
    if detail == "direction":
        drawn = resident_gradients(
            program, ids, lambda logits, _: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        )
        for gradients in drawn:
            for name, site in sites.items():
                along = (errors[name] * part(gradients[site.weight], site).float()).sum((1, 2), dtype=torch.float64)
                totals[name] = totals.get(name, torch.zeros(len(FORMATS))) + 0.5 * along.square() / ids.numel()
        return {name: value.tolist() for name, value in totals.items()}
    for gradients in resident_gradients(program, ids[:, :-1], lambda _, row: ids[row, 1:]):
        for name, site in sites.items():
            square = part(gradients[site.weight], site).double().square()
            square = square.mean().expand_as(square) if detail == "matrix" else square
            weighed = (square * errors[name].double().square()).sum((1, 2))
            totals[name] = totals.get(name, torch.zeros(len(FORMATS))) + 0.5 * weighed / ids[:, 1:].numel()
    return {name: value.tolist() for name, value in totals.items()}


def assert_equal_fisher(program: Program, context: Context, detail: Detail, tolerance: float) -> None:
    """All sites and formats; a directional value is a squared sum of terms of both signs, so small ones lose digits."""
    measure_fisher(program, requests(unique_sites(program).values(), FORMATS), context, detail=detail)
    expected = resident_fisher(program, context, detail)
    scale = max(max(values) for values in expected.values())
    wrong = []
    for name, site in unique_sites(program).items():
        found = [site.get(KEYS[detail])[fmt.name] for fmt in FORMATS]
        if found != pytest.approx(expected[name], rel=tolerance, abs=1e-6 * tolerance * scale):
            wrong.append(f"{name}: {found} but resident {expected[name]}")
    assert wrong == []
    assert len(expected) == len(unique_sites(program)) and scale > 0


@pytest.mark.parametrize("detail", ["direction", *slow("element", "matrix")])
def test_the_shipped_model(detail: Detail) -> None:
    """float32 sums of 1e5 terms of both signs err by some 1e5^0.5 * 2^-24 of a term; cancellation takes more digits."""
    assert_equal_fisher(aqtx.trace("tinymoe", dtype=torch.float32), context_of(3072), detail, 1e-3)


@pytest.mark.parametrize("detail", ["direction", "element", "matrix"])
@pytest.mark.parametrize("config", [None, LLAMA], ids=["experts", "dense, tied head"])
def test_small_models_with_everything_on_disk(tmp_path: Path, config: dict | None, detail: Detail) -> None:
    folder = write_checkpoint(tmp_path / "model", *(() if config is None else (config,)))
    context = context_of(192)
    context.work, context.max_memory = tmp_path / "work", 1
    assert_equal_fisher(aqtx.trace(folder, dtype=torch.float32), context, detail, 1e-3)
    assert not (tmp_path / "work" / "stream").exists(), "what was kept between blocks is gone"


def test_batches_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence at a time, or all in one batch."""
    folder, found = write_checkpoint(tmp_path / "model"), []
    for tokens in (40, 4096):
        monkeypatch.setattr(text_gradients_module, "TOKENS_PER_BATCH", tokens)
        program = aqtx.trace(folder, dtype=torch.float32)
        measure_fisher(program, requests(unique_sites(program).values(), FORMATS), context_of(192))
        found.append({name: list(site.get("fisher").values()) for name, site in unique_sites(program).items()})
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert values == pytest.approx(found[1][name], rel=1e-3), name


def test_a_gradient_goes_no_further_back_than_it_must(tmp_path: Path) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    ran: list[int | None] = []

    class Watched(Context):
        def progress(self, items, **words):
            for item in super().progress(items, **words):
                if words["description"] == "backward":
                    ran.append(item.layer)
                yield item

    ids = torch.randint(0, 192, (2, 16), generator=torch.Generator().manual_seed(1))
    context = Watched(quiet=True, load_calibration=lambda: ids)
    measure_fisher(program, requests([program.sites()[-2]], FORMATS), context)
    assert ran == [None, 1]


class Killed(Exception):
    pass


class Stopping(Context):
    """Stops once so many blocks are done backward."""

    left = 100
    ran: ClassVar[list[str]] = []

    def progress(self, items, **words):
        for item in super().progress(items, **words):
            if words["description"] == "backward":
                if not self.left:
                    raise Killed
                self.left -= 1
            self.ran.append(words["description"])
            yield item


KILLED = [(1, "direction"), *slow((0, "direction"), (2, "direction"), (2, "element"), (1, "matrix"))]


@pytest.mark.parametrize(("stop", "detail"), KILLED)
def test_a_killed_measurement_goes_on_at_its_block(tmp_path: Path, stop: int, detail: Detail) -> None:
    """The same values, bit for bit, and no finished block again."""
    folder, ids = write_checkpoint(tmp_path / "model"), context_of(192).calibration()

    def measured(work: Path, left: int) -> dict[str, object]:
        program = aqtx.trace(folder, dtype=torch.bfloat16)
        context = Stopping(seed=3, quiet=True, work=work, load_calibration=lambda: ids)
        context.left = left
        Stopping.ran.clear()
        measure_fisher(program, requests(unique_sites(program).values(), FORMATS), context, detail=detail)
        return {name: site.get(KEYS[detail]) for name, site in unique_sites(program).items()}

    expected = measured(tmp_path / "unbroken", 100)
    with pytest.raises(Killed):
        measured(tmp_path / "killed", stop)
    assert measured(tmp_path / "killed", 100) == expected
    assert Stopping.ran.count("backward") == 3 - stop  # head and two layers
    assert Stopping.ran.count("forward") == 3 - stop


def test_a_damaged_record_is_measured_again(tmp_path: Path) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "model"), dtype=torch.float32)
    context = context_of(192)
    context.work = tmp_path / "work"
    wanted = requests(unique_sites(program).values(), FORMATS[:1])
    measure_fisher(program, wanted, context)
    [record] = context.work.glob("fisher-*.safetensors")
    record.write_bytes(record.read_bytes()[:1000])
    before = {name: site.get("fisher") for name, site in unique_sites(program).items()}
    fresh = aqtx.trace(program.folder or "", dtype=torch.float32)
    measure_fisher(fresh, requests(unique_sites(fresh).values(), FORMATS[:1]), context)
    assert {name: site.get("fisher") for name, site in unique_sites(fresh).items()} == before
