"""Fill `tinymoe_readme.md`, the words of `models/tinymoe/README.md`; every number in it is handed in."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("tinymoe_readme.md")
NAMES = {
    "wiki": "Wikipedia articles",
    "web": "web pages (C4)",
    "python": "Python source",
    "docs": "Python's manual",
    "scripture": "King James Bible",
    "snippets": "code, many languages",
    "articles": "technical articles",
    "stories": "TinyStories",
    "all": "all five",
}


def render_readme(measured: Mapping[str, Any], training: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The whole README."""
    experts, distance = len(measured["loads"]["wiki"][0]), measured["distance_to_transformers"]
    fields = {
        "experts": experts,
        "even": 1 / experts,
        "weights": measured["weights"],
        "share": measured["expert_weights"] / measured["weights"],
        "megabytes": measured["bytes"] / 1e6,
        "millions": training["steps"] * training["tokens_a_step"] / 1e6,
        "minutes": training["seconds"] / 60,
        "distance": f"{distance:.1e}" if distance else "none, bit-equal",
        "sources": "\n".join(f"- `{source}`" for source in text["sources"]),
        "overlap": ", ".join(f"{share:.1%} ({NAMES[domain]})" for domain, share in text["shared_phrases"].items()),
        "perplexity_rows": perplexity_rows(measured, text),
        "load_rows": load_rows(measured["loads"]),
        "text_rows": text_rows(training, text),
    }
    return TEMPLATE.read_text("utf-8").format(**fields | dict(training))


def perplexity_rows(measured: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """One line a domain, and one for all windows."""
    lines = []
    tokens = measured["tokens"] | {"all": sum(measured["tokens"].values())}
    split = text["splits"]["evaluation"]
    totals = {key: sum(split[d][key] for d in split) for key in ("bytes", "tokens")}
    for domain, loss in measured["loss"].items():
        change = measured["mxfp4_change"][domain]
        counts = split.get(domain, totals)
        bits = loss["value"] / math.log(2) * counts["tokens"] / counts["bytes"]
        middle, low, high = (math.exp(loss[key]) for key in ("value", "low", "high"))
        lines.append(
            f"| {NAMES[domain]} | {tokens[domain]:,} | {middle:.2f} [{low:.2f}, {high:.2f}] | {bits:.3f} "
            f"| {change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}] |\n"
        )
    return "".join(lines)


def load_rows(loads: Mapping[str, list[list[float]]]) -> str:
    """One line a layer; the shift compares one expert's load in the domain that uses it most and least."""
    lines = []
    for layer in range(len(loads["wiki"])):
        by_expert = list(zip(*(domain[layer] for domain in loads.values()), strict=True))
        means = [sum(values) / len(values) for values in by_expert]
        widest = max(by_expert, key=lambda values: max(values) - min(values))
        inside = (ratio_words(max(domain[layer]), min(domain[layer])) for domain in loads.values())
        smallest, largest = min(means), max(means)
        lines.append(
            f"| {layer} | {smallest:.1%} | {largest:.1%} | {largest / smallest:.1f} "
            f"| {', '.join(inside)} | {min(widest):.1%} to {max(widest):.1%} |\n"
        )
    return "".join(lines)


def ratio_words(largest: float, smallest: float) -> str:
    """A ratio, also of an expert that one domain leaves out."""
    return f"{largest / smallest:.1f}" if smallest else "one unused"


def text_rows(training: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """Tokens per domain and split."""
    lines = []
    seen = training["steps"] * training["tokens_a_step"]
    for domain, share in training["mixture"].items():
        tokens = {split: domains.get(domain, {}).get("tokens", 0) for split, domains in text["splits"].items()}
        lines.append(
            f"| {NAMES[domain]} | {share:.0%} | {tokens['train']:,} ({seen * share / tokens['train']:.1f}) "
            f"| {tokens['calibration']:,} | {tokens['evaluation']:,} |\n"
        )
    return "".join(lines)
