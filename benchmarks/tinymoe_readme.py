"""The words of `models/tinymoe/README.md`; every number in it is handed in."""

import math
from collections.abc import Mapping
from typing import Any

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

HEAD = """# tinymoe

A small mixture-of-experts language model of the OLMoE architecture, trained from nothing on real text so that
quantization has something to lose. It is the embedded default model and the test model. It is not a useful writer.

| | |
| --- | --- |
| Architecture | `OlmoeForCausalLM`: 4 layers, hidden size 256, 4 heads, {experts} experts a layer, 4 a token, 128 inner |
| Weights | {weights:,}, of which {share:.1%} in experts; bf16, {megabytes:.1f} MB |
| Vocabulary | 3,072, byte-level BPE trained on the training text; `<|endoftext|>` is id 0 |
| Context | trained on rows of {length} tokens, of {long_length} in the last quarter; later positions are legal and untrained |
| Training | {steps:,} steps of {tokens_a_step:,} tokens = {millions:.2f} million tokens, {minutes:.0f} minutes on {threads} CPU thread, torch {torch} |
| Against `transformers` | largest difference of the logits in fp32: {distance:.1e} |

## Held-out perplexity

Windows of 512 tokens of the shipped evaluation text, fp32 arithmetic on the bf16 weights. Brackets: 95 % percentile
bootstrap over windows (2,000 draws). The last column is the paired change of the loss in nats a token when every expert
matrix is rounded to nearest in MXFP4 (blocks of 32, attention, router, embedding and head kept).

| domain | tokens | perplexity | bits a byte | MXFP4 change of loss |
| --- | ---: | ---: | ---: | ---: |
"""

TRAINING = """
![training curve](training_curve.png)

AdamW (betas 0.9 and 0.95, weight decay 0.1, clipping at 1), peak rate 2e-3, warm-up, plateau, linear decay over the last
40 %. fp32 master weights, bfloat16 matrix products. Seed {seed}; the rows of a step depend on seed and step alone, so a resumed run
equals an unbroken one on the same machine and thread count. Other processors may round differently, hence
the same script gives a model of the same quality, not the same bytes. `training_log.json` holds every tenth step.

    python -m benchmarks.prepare_text && python -m benchmarks.train_tinymoe && python -m benchmarks.describe_tinymoe

## Loads of the experts

Share of the routed token-expert pairs on the evaluation text; 1/{experts} = {even:.1%} would be even. The balancing loss is weak on purpose.

| layer | smallest | largest | ratio | largest shift between two domains |
| ---: | ---: | ---: | ---: | ---: |
"""

TEXT = """
## Text

Read from {sources}. Documents are compared by the SHA-256 of their text without white space and a second copy is dropped, so the
three splits are disjoint by document. Evaluation and calibration documents are chosen by the order of that hash
(`benchmarks/prepare_text.py`); neither tokenizer nor model saw them. Disjoint documents of one project still share phrases: of the
ten-word sequences of the evaluation text, {overlap} also occur in training documents.

| domain | share of training rows | training tokens (passes over them) | calibration | evaluation |
| --- | ---: | ---: | ---: | ---: |
"""

LICENCES = """
`text/calibration.jsonl` and `text/evaluation.jsonl` hold one document a line: `domain`, `source`, `text`.

## Licences

The weights, configuration and tokenizer are under the project's licence (Apache-2.0). The shipped text is not; each domain keeps its own:

| domain | source | licence |
| --- | --- | --- |
| wiki | English Wikipedia; `source` is the article's address, its history names the authors | CC BY-SA 4.0 (creativecommons.org/licenses/by-sa/4.0); mark-up was removed, nothing else changed |
| web | C4 (Allen Institute for AI, from Common Crawl); `source` is the line in `c4.utf8` | ODC-BY 1.0 (opendatacommons.org/licenses/by/1-0) for the collection, under Common Crawl's terms of use; rights in a page stay with its author |
| python | CPython 3.11 standard library, Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved; `Lib/tomllib` (c) 2021 Taneli Hukkinen, MIT | PSF License Agreement 2 (docs.python.org/3.11/license.html) |
| docs | Python 3.11's documentation, Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved | PSF License Agreement 2; examples also under Zero-Clause BSD |
| scripture | King James Version, from Debian's bible-kjv-text: "Bible Retrieval System, Chip Chapin, Hewlett Packard Company. This file is provided for unrestricted use provided that this legend is included." | public domain (in the United Kingdom printing is subject to letters patent) |

Trained on and not shipped: code in many languages, technical articles and TinyStories from the wheel `exllamav3`, of mixed licences.
"""


def render_readme(measured: Mapping[str, Any], training: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The whole README."""
    experts = len(measured["loads"]["wiki"][0])
    head = HEAD.format(
        experts=experts,
        weights=measured["weights"],
        share=measured["expert_weights"] / measured["weights"],
        megabytes=measured["bytes"] / 1e6,
        millions=training["steps"] * training["tokens_a_step"] / 1e6,
        minutes=training["seconds"] / 60,
        distance=measured["distance_to_transformers"],
        **{key: training[key] for key in ("length", "long_length", "steps", "tokens_a_step", "threads", "torch")},
    )
    middle = TRAINING.format(seed=training["seed"], experts=experts, even=1 / experts)
    about_text = TEXT.format(sources=", ".join(f"`{s}`" for s in text["sources"]), overlap=overlap_words(text))
    tables = (perplexity_rows(measured, text), load_rows(measured["loads"]), text_rows(training, text))
    return head + tables[0] + middle + tables[1] + about_text + tables[2] + LICENCES


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
        low, high = math.exp(loss["low"]), math.exp(loss["high"])
        lines.append(
            f"| {NAMES[domain]} | {tokens[domain]:,} | {math.exp(loss['value']):.2f} [{low:.2f}, {high:.2f}] | {bits:.3f} "
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
        lines.append(
            f"| {layer} | {min(means):.1%} | {max(means):.1%} | {max(means) / min(means):.1f} | {min(widest):.1%} to {max(widest):.1%} |\n"
        )
    return "".join(lines)


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


def overlap_words(text: Mapping[str, Any]) -> str:
    """The shared ten-word sequences in words."""
    return ", ".join(f"{share:.1%} ({domain})" for domain, share in text["shared_phrases"].items())
