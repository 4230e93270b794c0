"""Plans that a person wrote: layers, flat, and our own file."""

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from aqtx.errors import InputError
from aqtx.planning.manual import compact, expand, flatten, read_manual
from aqtx.program.plan import Plan, PlanEntry
from aqtx.program.roles import select

NAMES = [
    *(f"model.layers.{layer}.self_attn.{p}_proj" for layer in (0, 1) for p in "qkvo"),
    *(f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in (0, 1) for e in (0, 1)),
    "model.layers.0.mlp.gate",
    "lm_head",
]
SAMPLE = {
    "default": {"wq": "mxfp8", "aq": "mxfp8", "group_size": 128},
    "overrides": [
        {"pattern": "model.layers.0.*", "wq": "mxfp4", "group_size": 64},
        {"pattern": "*.experts.*", "wq": "mxfp6"},
    ],
}


def formats(data: dict[str, Any]) -> dict[str, str | None]:
    return {name: scheme.format for name, scheme in read_manual(data, NAMES)[0].items()}


def test_the_published_sample() -> None:
    schemes, warnings = read_manual(SAMPLE, NAMES)
    assert schemes["lm_head"].format == "mxfp8_e4m3"
    assert schemes["model.layers.0.self_attn.q_proj"].format == "mxfp4"
    assert schemes["model.layers.0.mlp.experts.1.up_proj"].format == "mxfp6_e2m3"
    assert {scheme.activation for scheme in schemes.values()} == {"mxfp8_e4m3"}
    assert warnings == ["group_size other than 32 was given for 14 sites with MX formats: their block stays 32"]


def test_layers_merge_key_by_key_and_the_last_wins() -> None:
    data = {
        "default": {"wq": "int4", "group_size": 128, "aq": "int8"},
        "overrides": [
            {"pattern": "*.experts.*", "group_size": 64},  # the default's wq stays
            {"pattern": "model.layers.1.*", "skip": True, "comment": "delicate"},
            {"pattern": "*.layers.1.mlp.experts.0.*", "wq": "int8"},  # lifts the skip
            {"pattern": "lm_head", "wq": "int3", "group_size": -1, "aq": None},
        ],
    }
    schemes, warnings = read_manual(data, NAMES)
    assert schemes["model.layers.0.self_attn.q_proj"].format == "int4"
    assert schemes["model.layers.0.mlp.experts.0.up_proj"].format == "int4_g64"
    assert schemes["model.layers.1.self_attn.q_proj"].format is None
    assert schemes["model.layers.1.self_attn.q_proj"].why == "delicate"
    assert schemes["model.layers.1.mlp.experts.0.up_proj"].format == "int8_g64"
    assert (schemes["lm_head"].format, schemes["lm_head"].activation) == ("int3_row", None)
    assert schemes["model.layers.0.mlp.gate"].activation == "int8"
    assert warnings == []


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({"wq": "mxfp6", "extra": {"format": "e3m2"}}, "mxfp6_e3m2"),
        ({"wq": "mxfp8", "extra": {"format": "e5m2"}}, "mxfp8_e5m2"),
        ({"wq": "fp6", "extra": {"format": "e3m2"}, "group_size": 32}, "fp6_e3m2_g32"),
        ({"wq": "int4", "extra": {"format": "e3m2"}}, "int4"),
        ({"wq": "int4_g32_asym", "group_size": 128}, "int4_g32_asym"),
        ({"wq": "int4_asym@search", "group_size": 64}, "int4_g64_asym"),
        ({"wq": "FP8", "group_size": 64}, "fp8_e4m3_g64"),
        ({"wq": "bf16"}, "bf16"),
        ({"wq": "none"}, None),
        ({"skip": True, "wq": "int4"}, None),
        ({"wq": "nvfp4", "alpha_hill": 3.2, "category": "mlp_up"}, "nvfp4"),
    ],
)
def test_schemes(scheme: dict[str, Any], expected: str | None) -> None:
    assert formats({"lm_head": scheme})["lm_head"] == expected
    assert formats({"default": scheme})["lm_head"] == expected


def test_flat_sites_that_are_not_named_stay() -> None:
    found = formats({"lm_head": "int8", "model.layers.0.mlp.gate": None, "summary": {"anything": 1}})
    assert found["lm_head"] == "int8"
    assert {value for name, value in found.items() if name != "lm_head"} == {None}


def test_forms_expand_into_one_another() -> None:
    flat = expand(SAMPLE, NAMES)
    assert flat["model.layers.0.self_attn.q_proj"] == {"wq": "mxfp4", "aq": "mxfp8_e4m3"}
    assert formats(flat) == formats(SAMPLE)
    layered = compact(flat, NAMES)
    assert layered["default"] == {"wq": "mxfp4", "aq": "mxfp8_e4m3"}
    assert expand(layered, NAMES) == flat


def test_expansion_keeps_skips_and_missing_activations() -> None:
    data = {"default": {"wq": "int4", "aq": "int8"}, "overrides": [{"pattern": "*.gate", "skip": True}]}
    data["overrides"].append({"pattern": "lm_head", "aq": None})  # type: ignore[attr-defined]
    flat = expand(data, NAMES)
    assert flat["lm_head"] == {"wq": "int4"} and flat["model.layers.0.mlp.gate"]["skip"] is True
    first, again = (read_manual(form, NAMES)[0] for form in (flat, compact(flat, NAMES)))
    assert [(s.format, s.activation) for s in first.values()] == [(s.format, s.activation) for s in again.values()]


def own_plan(names: list[str]) -> dict[str, Any]:
    entries = {name: PlanEntry(format=None if name == "lm_head" else "mxfp4", why="kept") for name in names}
    return Plan(sites=entries, method="alpha").to_json()


def test_our_own_plan_file_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(own_plan(NAMES)))
    schemes, _ = read_manual(str(file), NAMES)
    assert schemes["lm_head"].format is None and schemes[NAMES[0]].format == "mxfp4"


def test_a_plan_for_another_model_names_the_first_difference() -> None:
    with pytest.raises(InputError) as caught:
        read_manual(own_plan([*NAMES[:5], "model.layers.9.x", *NAMES[5:]]), NAMES)
    assert "for another model: the first differing site is 'model.layers.9.x', the plan has it" in str(caught.value)
    with pytest.raises(InputError, match=r"first differing site is 'model\.layers\.0\.self_attn\.v_proj', the model"):
        read_manual(own_plan([name for name in NAMES if "v_proj" not in name]), NAMES)
    with pytest.raises(InputError, match=r"first differing site is 'lm_heat', did you mean 'lm_head'"):
        read_manual({"lm_heat": "int4"}, NAMES)


def test_all_mistakes_at_once() -> None:
    data = {
        "default": {"wq": "int4", "groupsize": 64},
        "overides": [],
        "overrides": [{"pattern": "*.expert.*", "wq": "int8"}, {"pattern": "lm_head", "wk": "int8"}],
    }
    with pytest.raises(InputError) as caught:
        read_manual(data, NAMES)
    assert [problem.split(",")[0] for problem in caught.value.problems] == [
        "plan: unknown key 'overides'",
        "plan.default: unknown key 'groupsize'",
        "plan.overrides.0: pattern '*.expert.*' matches no site",
        "plan.overrides.1: unknown key 'wk'",
    ]


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"wq": "mxpf4"}, "unknown format 'mxpf4', did you mean 'mxfp4'?"),
        ({"wq": "int4", "group_size": 48}, "group_size 48 is none of"),
        ({"wq": "mxfp6", "extra": {"format": "e4m3"}}, "extra.format 'e4m3' is none of e2m3, e3m2 for mxfp6"),
    ],
)
def test_bad_schemes(scheme: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_manual({"default": scheme}, NAMES[:1])
    assert words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name, words in (("none.json", "is missing"), ("broken.json", "is not valid JSON")):
        with pytest.raises(InputError, match=words):
            read_manual(str(tmp_path / name), NAMES)


def test_an_element_is_taken_by_the_format_that_has_it() -> None:
    data = {"default": {"wq": "mxfp6", "aq": "mxfp8", "extra": {"format": "e3m2"}}}
    scheme = read_manual(data, NAMES)[0]["lm_head"]
    assert (scheme.format, scheme.activation) == ("mxfp6_e3m2", "mxfp8_e4m3")


def test_what_is_wrong_for_many_sites_is_told_once() -> None:
    with pytest.raises(InputError) as raised:
        read_manual({"default": {"wq": "mxfp6", "extra": {"format": "e9m9"}}}, NAMES)
    [problem] = raised.value.problems
    assert problem.startswith(f"plan, {NAMES[0]} and {len(NAMES) - 1} more sites: extra.format 'e9m9'")


ELEVEN = [f"model.layers.{layer}.mlp.gate" for layer in (1, 11, 21)]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("1.mlp.gate", []),
        ("mlp.gate", []),
        ("layers.1.mlp.gate", []),
        ("model.layers.1.mlp.gate", [1]),
        ("model.layers.1.mlp", []),
        ("*.1.mlp.gate", [1]),
        ("*1.mlp.gate", [1, 11, 21]),
        ("model.layers.?1.*", [11, 21]),
        ("model.layers.[12]1.*", [11, 21]),
        ("model?layers?1?mlp?gate", [1]),
        ("Model.layers.1.mlp.gate", []),
        (r"re:\.1\.mlp", [1]),
        (r"re:1\.mlp\.gate", [1, 11, 21]),  # a regular expression is searched for
    ],
)
def test_a_glob_is_for_whole_names_wherever_one_is_given(pattern: str, matched: list[int]) -> None:
    names = [f"model.layers.{layer}.mlp.gate" for layer in matched]
    if not pattern.startswith("re:"):
        assert names == [name for name in ELEVEN if fnmatch.fnmatchcase(name, pattern)]
    plan = {"default": {}, "overrides": [{"pattern": pattern, "wq": "int4"}]}
    if names:
        assert list(select(ELEVEN, [pattern], "keep")) == names
        assert [name for name, keys in flatten(plan, ELEVEN).items() if "wq" in keys] == names
        return
    with pytest.raises(InputError, match=r"keep: .* matches no site"):
        select(ELEVEN, [pattern], "keep")
    with pytest.raises(InputError, match=r"plan.overrides.0: pattern .* matches no site"):
        flatten(plan, ELEVEN)


def test_the_end_of_a_name_is_met_with_the_pattern_that_was_meant() -> None:
    with pytest.raises(InputError, match=r"before: '1.mlp.gate' matches no site, did you mean '\*1.mlp.gate'\?"):
        select(ELEVEN, ["1.mlp.gate"], "before")


def test_a_compact_plan_names_one_site_where_another_ends_alike() -> None:
    names = ["gate", "a.gate", "b.gate"]
    flat = {"gate": "int8", "a.gate": "int4", "b.gate": "int4"}
    assert expand(compact(flat, names), names) == expand(flat, names)
