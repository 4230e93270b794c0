"""Measure the shipped `tinymoe` and write its README and training curve.

    python -m benchmarks.describe_tinymoe --out models/tinymoe --work build/tinymoe

Perplexity is taken over windows of 512 tokens of the shipped evaluation text (documents of a domain in a
row, an end-of-text id before each; the tail that fills no window is left out). Intervals are 95 %
percentile bootstraps over windows; a change is paired, window by window. The MXFP4 column rounds every
expert matrix to nearest (OCP MX 1.0: E2M1 codes, one power-of-two scale for 32 inputs) as a yardstick.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from aqtx.models.olmoe import Olmoe, OlmoeConfig
from benchmarks.prepare_text import END_OF_TEXT, SHIPPED_DOMAINS
from benchmarks.tinymoe_readme import render_readme
from benchmarks.train_tinymoe import expert_loads, router_logits

WINDOW, BATCH = 512, 8
BOOTSTRAP_DRAWS, BOOTSTRAP_SEED = 2_000, 0
MX_BLOCK = 32
E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
log = logging.getLogger("describe_tinymoe")


@dataclass(frozen=True)
class Measured:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def load_model(folder: Path) -> Olmoe:
    """The shipped checkpoint in fp32, its experts stacked."""
    config = json.loads((folder / "config.json").read_text())
    model = Olmoe(OlmoeConfig.from_dict(config))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        state = {}
        for name in model.state_dict():
            head, found, projection = name.partition(".experts.")
            if found:
                names = [f"{head}.experts.{e}.{projection}.weight" for e in range(config["num_experts"])]
                state[name] = torch.stack([file.get_tensor(n).float() for n in names])
            else:
                state[name] = file.get_tensor(name).float()
    model.load_state_dict(state)
    return model.eval()


def evaluation_windows(folder: Path) -> dict[str, Tensor]:
    """Domain -> ids [windows, WINDOW] of the shipped evaluation text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: dict[str, list[int]] = {domain: [] for domain in SHIPPED_DOMAINS}
    end = tokenizer.encode(END_OF_TEXT).ids
    with (folder / "text" / "evaluation.jsonl").open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            ids[record["domain"]] += [*end, *tokenizer.encode(record["text"]).ids]
    return {name: torch.tensor(row[: len(row) // WINDOW * WINDOW]).view(-1, WINDOW) for name, row in ids.items()}


@torch.no_grad()
def window_losses(model: Olmoe, windows: Tensor) -> np.ndarray:
    """Mean loss in nats a token of each window."""
    losses = []
    for rows in windows.split(BATCH):
        logits = model(rows)[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        losses.append(loss.mean(1))
    return torch.cat(losses).double().numpy()


def bootstrap(values: np.ndarray) -> Measured:
    """Mean and its 95 % percentile bootstrap interval."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    draws = generator.integers(0, len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return Measured(float(values.mean()), float(low), float(high))


@torch.no_grad()
def layer_loads(model: Olmoe, windows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Domain -> share of the routed pairs of each expert, [L, E]."""
    loads = {}
    for domain, rows in windows.items():
        with router_logits(model) as routed:
            for part in rows.split(BATCH):
                model(part)
        layers = len(model.model.layers)
        loads[domain] = torch.stack([expert_loads(torch.cat(routed[layer::layers])) for layer in range(layers)])
    return loads


def round_to_mxfp4(weight: Tensor) -> Tensor:
    """Nearest MXFP4 value, blocks along the last dimension; ties go to the even code."""
    blocks = weight.unflatten(-1, (-1, MX_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-126)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    distance = ((blocks / scale).abs().clamp_max(6.0).unsqueeze(-1) - E2M1_VALUES).abs()  # [..., 8]
    ties = torch.arange(8) % 2 * 1e-6  # the odd code of two equally near ones loses
    nearest = E2M1_VALUES[(distance + ties).argmin(-1)]
    return (nearest * blocks.sign() * scale).reshape(weight.shape)


@torch.no_grad()
def quantize_experts(model: Olmoe) -> None:
    """Round every expert matrix to MXFP4, in place."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.copy_(torch.stack([round_to_mxfp4(matrix) for matrix in parameter]))


@torch.no_grad()
def distance_to_transformers(model: Olmoe, folder: Path, ids: Tensor) -> float:
    """Largest difference of the logits from transformers' own OLMoE, both in fp32."""
    from transformers import OlmoeForCausalLM

    other = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return float((model(ids) - other(ids).logits).abs().max())


def draw_curve(records: list[dict[str, float]], path: Path) -> None:
    """Training loss (smoothed) and held-out loss per domain over tokens."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    loss = np.array([record["loss"] for record in records])
    smooth = np.convolve(np.pad(loss, 7, mode="edge"), np.ones(15) / 15, mode="valid")
    axes.plot([r["tokens"] / 1e6 for r in records], smooth, color="0.6", label="training mixture")
    marked = [record for record in records if "held_out_wiki" in record]
    for domain in SHIPPED_DOMAINS:
        values = [record[f"held_out_{domain}"] for record in marked]
        axes.plot([r["tokens"] / 1e6 for r in marked], values, marker=".", label=f"{domain}, held out")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)", ylim=(None, 6.5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": ""})


def measure(folder: Path) -> dict[str, object]:
    """Everything the README states about the checkpoint."""
    model, windows = load_model(folder), evaluation_windows(folder)
    distance = distance_to_transformers(model, folder, windows["wiki"][:2])
    before = {domain: window_losses(model, rows) for domain, rows in windows.items()}
    loads = layer_loads(model, windows)
    weights = {name: parameter.numel() for name, parameter in model.named_parameters()}
    quantize_experts(model)
    after = {domain: window_losses(model, rows) for domain, rows in windows.items()}
    before["all"], after["all"] = np.concatenate(list(before.values())), np.concatenate(list(after.values()))
    return {
        "loss": {domain: vars(bootstrap(values)) for domain, values in before.items()},
        "mxfp4_change": {domain: vars(bootstrap(after[domain] - before[domain])) for domain in before},
        "tokens": {domain: rows.numel() for domain, rows in windows.items()},
        "loads": {domain: values.tolist() for domain, values in loads.items()},
        "distance_to_transformers": distance,
        "weights": sum(weights.values()),
        "expert_weights": sum(count for name, count in weights.items() if ".experts." in name),
        "bytes": (folder / "model.safetensors").stat().st_size,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure tinymoe and write its README.")
    parser.add_argument("--out", type=Path, default=Path("models/tinymoe"))
    parser.add_argument("--work", type=Path, default=Path("build/tinymoe"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    training = json.loads((arguments.out / "training_log.json").read_text())
    text = json.loads((arguments.work / "text_summary.json").read_text())
    measured = measure(arguments.out)
    draw_curve(training["records"], arguments.out / "training_curve.png")
    (arguments.out / "README.md").write_text(render_readme(measured, training, text))
    log.info(
        "%s", json.dumps({key: measured[key] for key in ("loss", "mxfp4_change", "distance_to_transformers")}, indent=2)
    )


if __name__ == "__main__":
    main()
