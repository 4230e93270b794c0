"""llm-compressor's GPTQ on a saved layer, in its own environment: `python run_llmcompressor.py IN OUT FORMAT SETTING`.

Its own functions do all the work: observer, Hessian accumulation, batched `quantize_weight`. All experts of a
projection go as one batch, which is what its `batched_quantization: auto` does when memory allows.
SETTING is `default`, what its `GPTQModifier` takes unless told otherwise (static act-order), or `plain`, without it.
"""

import json
import sys
import time
from typing import Any

import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian, prepare_batch
from llmcompressor.observers import Observer
from safetensors.torch import load_file, save_file


def main(source: str, target: str, format_name: str, setting: str) -> None:
    """Load, round, save, print seconds."""
    torch.set_num_threads(1)
    problem = load_file(source)
    scheme = {"int4": "W4A16", "mxfp4": "MXFP4A16"}[format_name]
    order = {"default": {}, "plain": {"actorder": None}}[setting]
    modifier = GPTQModifier(targets=["Linear"], scheme=scheme, **order)
    [group] = modifier.resolve_quantization_config().config_groups.values()
    out, started, wall = {}, time.process_time(), time.perf_counter()
    with torch.no_grad():
        for projection in ("gate", "up", "down"):
            out[projection] = quantize(problem, projection, group.weights, modifier)
    told = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - wall}
    save_file({name: value.float().contiguous() for name, value in out.items()}, target)
    order_taken = group.weights.actorder and group.weights.actorder.value
    print(json.dumps(told | {"act-order": order_taken, "damping": modifier.dampening_frac}))


def quantize(problem: dict[str, torch.Tensor], projection: str, args: Any, modifier: GPTQModifier) -> torch.Tensor:
    """One projection of all experts."""
    rows = problem["inner" if projection == "down" else "rows"]
    modules, hessians, samples, qparams = [], {}, {}, []
    start = 0
    for weight, end in zip(problem[projection], problem["offsets"].tolist(), strict=True):
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = weight.clone()
        hessian, count = make_empty_hessian(module), torch.zeros(())
        hessians[module], samples[module] = accumulate_hessian(rows[start:end], module, hessian, count)
        observer = Observer.load_from_registry(args.observer or "memoryless_minmax", base_name="weight", args=args)
        qparams.append(observer(module.weight).get_qparams())
        modules.append(module)
        start = end
    weights, stacked, scale, zero_point, global_scale = prepare_batch(modules, qparams, hessians, samples)
    return quantize_weight(
        weights, stacked, scale, zero_point, global_scale, args, modifier.block_size, modifier.dampening_frac
    )[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
