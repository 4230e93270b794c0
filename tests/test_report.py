"""The page of a run: every section present, numbers and figures from the data alone, gaps said in words."""

import csv
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from aqtx.errors import InputError
from aqtx.report.canvas import save_figure
from aqtx.report.compare import write_comparison
from aqtx.report.data import read_run
from aqtx.report.figures_clusters import assign_clusters
from aqtx.report.figures_maps import draw_grids, layer_map
from aqtx.report.fits import all_fits
from aqtx.report.numbers import decimal, interval, megabytes
from aqtx.report.parts import PARTS
from aqtx.report.write import write_report

LAYERS, EXPERTS, COLUMNS = (
    3,
    4,
    ("layer_name", "alpha_hill", "category", "shape", "numel", "k_used", "n_eigs", "method"),
)


def sites():
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}"
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield f"model.layers.{layer}.mlp.experts.{expert}.{name}"


def change(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def gptq_row(name, index):
    return {
        "site": name,
        "tokens": 7 * index,
        "damping": 0.01,
        "shrinkage": 0.5,
        "error_before": 0.02,
        "error_after": 0.01 + 1e-4 * index,
    }


def report_of(names):
    perplexity = {"before": change(20.0), "after": change(21.0), "change": change(0.05), "num_documents": 9}
    experts = [name for name in names if ".experts." in name]
    router = {
        "layers": [
            {"layer": i, "shift_before": 0.3, "shift_after": 0.1, "load_before": [1.0] * 4, "load_after": [1.0] * 4}
            for i in range(LAYERS)
        ],
        "curve": [{"step": 0, "training": 3.0, "validation": 3.1}, {"step": 5, "training": 2.9, "validation": 3.0}],
    }
    return {
        "name": "sample <run>",
        "weights": {"total": 10, "quantized": 7, "kept": 2, "refused": 1},
        "sites": {"total": 10, "quantized": 7, "kept": 2, "refused": 1},
        "average_bits": 4.9,
        "average_bits_model": 6.1,
        "bytes": {"before": 20_000_000, "after": 8_000_000},
        "perplexity": perplexity,
        "perplexity_by_domain": {"wiki": perplexity},
        "tasks": {"hellaswag": {"metric": "acc_norm", "num_items": 50, "before": change(0.3), "after": change(0.29)}},
        "passes": [
            {
                "name": "assign_plan",
                "seconds": 1.5,
                "changed": 40,
                "refused": [{"site": names[0], "why": "kept"}],
                "details": {
                    "target": {"name": "vllm", "bits": 3.4987, "free_bits": 3.5, "cost": 0.012,
                               "free_cost": 0.0105, "budget": 3.6}
                },
            },
            {"name": "gptq", "seconds": 61, "changed": 36, "refused": [], "max_difference": None,
             "details": {"sites": [gptq_row(name, index) for index, name in enumerate(experts)]}},
            {"name": "finetune_router", "seconds": 3, "changed": 3, "refused": [], "details": router},
        ],
        "peak_memory_bytes": 2e9,
        "seconds": 200,
        "versions": {"torch": "2.13.0"},
        "settings": {"seed": 0, "model": {"source": "tinymoe"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    names = list(sites())
    random = np.random.default_rng(0)
    alphas = {name: float(value) for name, value in zip(names, random.uniform(2, 6, len(names)), strict=True)}
    for file, shift in (("alpha.csv", 0.0), ("alpha_after.csv", 0.1)):
        with (folder / file).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, restval="x")
            writer.writeheader()
            writer.writerows({"layer_name": n, "alpha_hill": a + shift, "numel": 128 * 64} for n, a in alphas.items())
    entries = {
        name: {"format": "mxfp4" if index % 2 else "mxfp8", "bytes": 4352 * (2 - index % 2), "error": 0.01, "why": "x"}
        for index, name in enumerate(names)
    }
    (folder / "plan.json").write_text(json.dumps({"method": "alpha", "gap": 1e-4, "sites": entries}))
    (folder / "report.json").write_text(json.dumps(report_of(names)))
    points = [
        {"method": m, "bytes": b, "perplexity": change(20 + 1e7 / b), "change": change(1e4 / b)}
        for m in ("alpha", "uniform")
        for b in (5e6, 6e6)
    ]
    (folder / "study.json").write_text(json.dumps({"points": points}))
    write_report(folder)
    return folder


def test_every_section_and_figure_is_there_and_nothing_is_fetched(run_folder):
    page = (run_folder / "report.html").read_text()
    stems = [stem for part in PARTS for stem in part.figures]
    assert [path.stem for path in sorted((run_folder / "figures").iterdir())] == sorted(stems)
    assert re.findall(r'<section id="([a-z]+)"', page) == [part.anchor for part in PARTS]
    assert re.findall(r'id="figure-([a-z_]+)"', page) == stems
    assert 'class="absent"' not in page
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "<script" not in page
    assert "sample &lt;run&gt;" in page


def test_numbers_of_the_data_stand_in_the_tables(run_folder):
    page = (run_folder / "report.html").read_text()
    for words in (
        "8.00 MB",
        "40.0 % of before",
        "20.00 [19.99, 20.01]",
        "+0.0500 [+0.0400, +0.0600]",
        "<td>kept</td>",
        "For vllm: 3.4987 bits per weight in what it loads, predicted cost 0.012.",
        "The budget is 3.6000 bits: no plan of these candidates within it has a lower cost.",
        "would give 0.0105 at 3.5000 bits",
        "2.13.0",
    ):
        assert words in page, words
    assert "larger than chance explains" in page


def test_equal_data_gives_equal_pages_and_figures(run_folder):
    before = {path.name: path.read_bytes() for path in run_folder.rglob("*.*") if path.is_file()}
    write_report(run_folder)
    after = {path.name: path.read_bytes() for path in run_folder.rglob("*.*") if path.is_file()}
    assert [name for name in before if before[name] != after[name]] == []


@pytest.fixture
def quick_figures(monkeypatch):
    """Draw, but render no pixels: drawing is where missing data shows, rendering is what takes the time."""

    def save(draw, path):
        draw()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    monkeypatch.setattr("aqtx.report.parts.save_figure", save)


@pytest.mark.parametrize("missing", ["report.json", "plan.json", "alpha.csv", "study.json"])
@pytest.mark.usefixtures("quick_figures")
def test_a_missing_file_leaves_a_sentence(run_folder, tmp_path, missing):
    for path in run_folder.glob("*.*"):
        if path.name != missing and path.suffix != ".html":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    page = write_report(tmp_path).read_text()
    assert re.findall(r'<section id="([a-z]+)"', page) == [part.anchor for part in PARTS]
    assert '<p class="absent">' in page


def test_a_broken_file_is_noted_and_an_empty_folder_refused(run_folder, tmp_path):
    with pytest.raises(InputError, match="not a run"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        write_report(tmp_path / "none")
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "report.json").write_text(json.dumps({"name": "bare"}))
    assert "plan.json cannot be read" in write_report(tmp_path).read_text()


def test_maps_put_each_value_at_its_layer_and_expert(run_folder):
    data = read_run(run_folder)
    grid = data.expert_grid("alpha", "down_proj")
    assert grid.shape == (LAYERS, EXPERTS)
    assert grid[2, 3] == data.sites["model.layers.2.mlp.experts.3.down_proj"]["alpha"]
    assert data.attention_grid("bits").shape == (LAYERS, 4)
    figure = layer_map("alpha", "alpha")(data)
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == ["gate_proj", "up_proj", "down_proj", "attention", ""]


def test_fits_explain_what_they_should():
    x = np.linspace(-1, 3, 400)
    parabola = {fit.name: fit.r_squared for fit in all_fits(x, x**2 - 2 * x)}  # symmetric about x = 1: no line helps
    assert parabola["linear"] == pytest.approx(0, abs=1e-9)
    assert parabola["quadratic"] == pytest.approx(1, abs=1e-9)
    wave = {fit.name: fit.r_squared for fit in all_fits(x, np.abs(x - 1))}
    assert wave["LOESS"] > 0.9 > wave["linear"]
    assert [fit.name for fit in all_fits(np.array([1.0, 2.0, 1.0]), np.ones(3))] == []


def test_numbers_read_well():
    assert megabytes(19_940_000) == "19.94 MB"
    assert (decimal(None), decimal(0.00001), decimal(2)) == ("–", "1.0e-05", "2.000")
    assert interval({"value": 1.0, "low": None, "high": None}, 1) == "1.0"


def test_a_saved_figure_holds_no_date(tmp_path):
    for name in ("a.png", "b.png"):
        save_figure(lambda: Figure(figsize=(1, 1)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_map_of_equal_values_has_one_colour():
    figure = draw_grids({"a": np.full((2, 2), 0.01), "b": np.full((2, 2), 0.01 * (1 + 1e-15))}, "error")
    low, high = figure.axes[0].images[0].get_clim()
    assert low < 0.009
    assert high > 0.011


@pytest.mark.usefixtures("quick_figures")
def test_runs_stand_side_by_side_with_what_differs(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("aqtx.report.compare.save_figure", save_figure)
    other = tmp_path / "other"
    other.mkdir()
    report = json.loads((run_folder / "report.json").read_text())
    report["settings"] = {"seed": 0, "passes": [{"gptq": {"damp_fraction": 0.1}}, "emit"]}
    (other / "report.json").write_text(json.dumps(report))
    page = write_comparison([run_folder, other], tmp_path / "page").read_text()
    assert re.findall(r'<section id="([a-z]+)"', page) == ["overview", *(part.anchor for part in PARTS)]
    assert "<th>sample &lt;run&gt;-2</th>" in page  # two runs of one name
    assert "<td>passes.gptq.damp_fraction</td><td>–</td><td>0.1</td>" in page
    assert "<td>seed</td>" not in page
    with pytest.raises(InputError, match="two runs"):
        write_comparison([run_folder], tmp_path)
    with pytest.raises(InputError, match=r"`aqtx compare` did not write"):
        write_comparison([run_folder, other], other)
    assert (other / "report.json").exists()
    write_comparison([run_folder, other], tmp_path / "page")  # a page is replaced


def test_clusters_find_groups_that_are_there():
    random = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 300], [10, 300]])
    groups = [centre + random.normal(size=(count, 2)) for centre, count in zip(centres, (9, 7, 5, 3), strict=True)]
    labels = assign_clusters(np.concatenate(groups))
    assert labels.tolist() == [0] * 9 + [1] * 7 + [2] * 5 + [3] * 3


def test_the_quickstarts_page_holds_its_figures_and_says_what_it_has_not(quickstart):
    page = (quickstart.directory / "report.html").read_text()
    drawn = {path.stem for path in (quickstart.directory / "figures").iterdir()}
    assert drawn >= {
        "alpha_histogram",
        "alpha_before_after",
        "map_alpha",
        "map_bits",
        "map_error",
        "perplexity_change",
        "clusters",
    }
    assert set(re.findall(r'id="figure-([a-z_]+)"', page)) == drawn
    assert "No router was trained in this run" in page
    assert "This run has no task results" in page
