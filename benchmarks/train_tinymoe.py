"""Train `tinymoe`, a small mixture-of-experts of the OLMoE architecture, on one thread of a CPU.

    python -m benchmarks.prepare_text
    python -m benchmarks.train_tinymoe --out models/tinymoe --work build/tinymoe

AdamW with fp32 weights, matrix products in bfloat16; learning rate warm-up, plateau and linear decay. Rows
of 256 tokens, of 512 in the last quarter. The rows of step s are drawn by a generator seeded with (seed, s),
so a resumed run equals an unbroken one. Every `SAVE_EVERY` steps the full state is written to `work` and a
snapshot of the model to `out`, each under a temporary name first. The same command run again goes on from
the last state.

The load-balancing loss is weak on purpose: it keeps every expert alive and lets their loads differ.
"""

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aqtx.formats.grouped_linear import grouped_linear
from aqtx.models.olmoe import Olmoe, OlmoeConfig

EXPERTS_A_TOKEN = 4
CONFIG: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": EXPERTS_A_TOKEN,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "clip_qkv": None,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "dtype": "bfloat16",
}
MIXTURE = {  # share of the training rows
    "wiki": 0.17,
    "web": 0.13,
    "python": 0.24,
    "docs": 0.21,
    "scripture": 0.13,
    "snippets": 0.07,
    "articles": 0.02,
    "stories": 0.03,
}
SEED = 1
TOKENS = 2_048  # a step
LENGTH, LONG_LENGTH, LONG_SHARE = 256, 512, 0.25  # the last quarter of the steps sees longer rows
WARM_UP_STEPS, DECAY_SHARE = 150, 0.4
PEAK_RATE, WEIGHT_DECAY, CLIP = 2e-3, 0.1, 1.0
BALANCE_WEIGHT = 0.01  # of a loss that is 1 when even: a quarter of what OLMoE used
LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 10, 250, 250
EVALUATION_ROWS = 16  # a domain, for the curve only
log = logging.getLogger("train_tinymoe")


@dataclass
class Run:
    """Everything that a resumed run needs."""

    model: Olmoe
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    records: list[dict[str, float]] = field(default_factory=list)


def build_model() -> Olmoe:
    """Normal(0, 0.02) weights, the projections that write to the residual scaled by 1/sqrt(2 L)."""
    torch.manual_seed(SEED)
    model = Olmoe(OlmoeConfig.from_dict(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            writes = "o_proj" in name or "down_proj" in name
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(model.model.layers)) if writes else 0.02)
    return model


def build_optimizer(model: Olmoe) -> torch.optim.AdamW:
    """Weight decay on matrices, none on norms and embeddings."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed_tokens" in n]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, plateau, linear decay to zero over the last `DECAY_SHARE` of the steps."""
    decay_steps = int(steps * DECAY_SHARE)
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / decay_steps)


def draw_rows(tokens: dict[str, np.ndarray], step: int, length: int) -> Tensor:
    """ids [TOKENS / length, length + 1] of one step, a function of the seed, the step and the length alone."""
    generator = np.random.Generator(np.random.PCG64([SEED, step]))
    names, shares = list(MIXTURE), np.array(list(MIXTURE.values()))
    rows = []
    for name in generator.choice(names, size=TOKENS // length, p=shares / shares.sum()):
        start = generator.integers(0, len(tokens[name]) - length - 1)
        rows.append(tokens[name][start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@contextmanager
def router_logits(model: Olmoe) -> Iterator[list[Tensor]]:
    """Collect each layer's router logits [T, E] while the context is open."""
    seen: list[Tensor] = []
    hooks = [
        cast(Any, block).mlp.gate.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
        for block in model.model.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def expert_loads(logits: Tensor) -> Tensor:
    """Share of the routed pairs that each expert gets: logits [T, E] -> [E], sums to 1."""
    chosen = logits.topk(EXPERTS_A_TOKEN, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()


def balance_loss(logits: Tensor) -> Tensor:
    """Switch Transformer's loss, 1 when all loads are equal."""
    probabilities = logits.float().softmax(-1).mean(0)
    return logits.shape[-1] * (expert_loads(logits) * probabilities).sum()


def train_step(run: Run, ids: Tensor, rate: float) -> dict[str, float]:
    """One update; returns what the log shows."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with router_logits(run.model) as routed, torch.autocast("cpu", torch.bfloat16):
        logits = run.model(ids[:, :-1])
    text_loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    balance = torch.stack([balance_loss(layer) for layer in routed]).mean()
    (text_loss + BALANCE_WEIGHT * balance).backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": text_loss.item(), "balance": balance.item(), "gradient_norm": float(norm), "rate": rate}


@torch.no_grad()
def quick_evaluation(model: Olmoe, tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """Loss per domain on the first evaluation rows, and the spread of the experts' loads."""
    result: dict[str, float] = {}
    loads: list[Tensor] = []
    for domain, ids in tokens.items():
        rows = torch.from_numpy(ids[: EVALUATION_ROWS * LENGTH].astype(np.int64)).view(EVALUATION_ROWS, LENGTH)
        with router_logits(model) as routed, torch.autocast("cpu", torch.bfloat16):
            logits = model(rows)
        result[f"held_out_{domain}"] = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()
        ).item()
        loads.append(torch.stack([expert_loads(layer) for layer in routed]))
    mean = torch.stack(loads).mean(0)  # [L, E]
    result["largest_load"], result["smallest_load"] = mean.max().item(), mean.min().item()
    return result


def hub_tensors(model: Olmoe) -> dict[str, Tensor]:
    """bf16 tensors under the names of transformers' checkpoints: one matrix an expert."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        value = parameter.detach().to(torch.bfloat16)
        head, found, projection = name.rpartition(".experts.")
        if not found:
            tensors[name] = value.contiguous().clone()
            continue
        for expert, matrix in enumerate(value):
            tensors[f"{head}.experts.{expert}.{projection}.weight"] = matrix.contiguous().clone()
    return tensors


def export_model(model: Olmoe, out: Path) -> None:
    """config.json and model.safetensors, each replaced in one move."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(hub_tensors(model), out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    (out / "config.json.part").write_text(json.dumps(CONFIG, indent=2) + "\n")
    os.replace(out / "config.json.part", out / "config.json")


def save_run(run: Run, work: Path, out: Path) -> None:
    """The state to resume from, the log, and a snapshot of the model."""
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "step": run.step,
        "seconds": run.seconds,
        "records": run.records,
    }
    torch.save(state, work / "state.pt.part")
    os.replace(work / "state.pt.part", work / "state.pt")
    export_model(run.model, out)


def start_run(work: Path) -> Run:
    """A new run, or the one whose state lies in `work`."""
    model = build_model()
    run = Run(model, build_optimizer(model))
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds, run.records = state["step"], state["seconds"], state["records"]
    return run


def train(steps: int, work: Path, out: Path) -> None:
    """Run to `steps`, from the start or from the last state."""
    train_tokens = dict(np.load(work / "train.npz").items())
    held_out = dict(np.load(work / "evaluation.npz").items())
    run = start_run(work)
    while run.step < steps:
        began = time.perf_counter()
        length = LENGTH if run.step < steps * (1 - LONG_SHARE) else LONG_LENGTH
        record = train_step(run, draw_rows(train_tokens, run.step, length), learning_rate(run.step, steps))
        run.step += 1
        if run.step % EVALUATE_EVERY == 0 or run.step == steps:
            record |= quick_evaluation(run.model, held_out)
        run.seconds += time.perf_counter() - began
        if run.step % LOG_EVERY == 0 or run.step == steps:
            run.records.append({"step": run.step, "tokens": run.step * TOKENS, "seconds": run.seconds} | record)
            log.info("%s", json.dumps({key: round(value, 5) for key, value in run.records[-1].items()}))
        if run.step % SAVE_EVERY == 0 or run.step == steps:
            save_run(run, work, out)
    write_log(run, out / "training_log.json")


def write_log(run: Run, path: Path) -> None:
    """What the run was and its records, one a line."""
    settings = {
        "steps": run.step,
        "tokens_a_step": TOKENS,
        "length": LENGTH,
        "long_length": LONG_LENGTH,
        "seed": SEED,
        "mixture": MIXTURE,
        "seconds": run.seconds,
    }
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    head = json.dumps(settings | machine, indent=1)[:-2]
    rows = [json.dumps({key: round(value, 5) for key, value in record.items()}) for record in run.records]
    path.write_text(head + ',\n "records": [\n' + ",\n".join(rows) + "\n ]\n}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train tinymoe.")
    parser.add_argument("--steps", type=int, default=4_900)
    parser.add_argument("--out", type=Path, default=Path("models/tinymoe"))
    parser.add_argument("--work", type=Path, default=Path("build/tinymoe"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    grouped_linear.register_autocast("cpu", torch.bfloat16)
    train(arguments.steps, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
