"""Small programs of every architecture to rotate, and rotations of every kind to put into them."""

import copy
from functools import cache

import torch

import aqtx
from aqtx.program.hadamard_op import OP
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from aqtx.runs.recipe import build
from tests.tiny import OLMOE, random_model

SMALL = OLMOE | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "vocab_size": 96}
ARCHITECTURES = {
    "olmoe": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "deepseek": {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
FUSED = (  # R1, R2, then an online block before down_proj
    ("fold_norms", {}),
    ("insert_hadamard", {"before": ["residual"], "block": "full"}),
    ("insert_hadamard", {"before": ["attn_o"], "block": "head"}),
    ("insert_hadamard", {"before": ["re:(down_proj|w2)$"], "block": 16}),
    ("fuse_hadamard", {}),
)


def tiny(model_type: str = "olmoe", dtype: torch.dtype = torch.bfloat16, **own: object) -> Program:
    """A program that a test may change; each model is traced once."""
    return copy.deepcopy(traced(model_type, dtype, tuple(own.items())))


@cache
def traced(model_type: str, dtype: torch.dtype, own: tuple[tuple[str, object], ...]) -> Program:
    config = SMALL | {"model_type": model_type} | ARCHITECTURES[model_type] | dict(own)
    model = random_model(config, dtype=dtype)
    model.hf_config = config
    return aqtx.trace(model)


def rotated(program: Program, steps=FUSED, seed: int = 3) -> Run:
    passes = [build(name, fields, name)[0] for name, fields in steps]
    run = Run(program, Context(seed=seed, quiet=True))
    run.execute(passes)
    return run


def rotations(program: Program) -> list[str]:
    return [node.name for node in program.graph.nodes if node.target is OP]
