"""GPTQModel's GPTQ on a saved layer, in its own environment: `python run_gptqmodel.py IN OUT FORMAT SETTING`.

One matrix after another, as its CPU path works; `up` adopts the Hessian of `gate`, as it does for modules
that share an input. It has no MXFP4 target in GPTQ. SETTING is `default`, all that its `QuantizeConfig` takes unless
told otherwise (activation-aware order of groups, damping 0.05), or `plain`, without it and with our damping of 0.01.
"""

import json
import sys
import time
from typing import Any

import torch
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import load_file, save_file

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"desc_act": False, "act_group_aware": False, "damp_percent": 0.01},
}


def main(source: str, target: str, format_name: str, setting: str) -> None:
    """Load, round, save, print seconds."""
    if format_name != "int4":
        raise SystemExit(f"GPTQModel has no GPTQ to {format_name}")
    torch.set_num_threads(1)
    problem, options = load_file(source), SETTINGS[setting]
    out = {name: torch.empty_like(problem[name]) for name in ("gate", "up", "down")}
    started, wall = time.process_time(), time.perf_counter()
    with torch.no_grad():
        start = 0
        for expert, end in enumerate(problem["offsets"].tolist()):
            tasks = {name: make_task(problem[name][expert], options) for name in out}
            tasks["gate"].add_batch(problem["rows"][start:end].unsqueeze(0), None)
            tasks["up"].adopt_hessian_from(tasks["gate"])
            tasks["down"].add_batch(problem["inner"][start:end].unsqueeze(0), None)
            for name, task in tasks.items():
                out[name][expert] = task.quantize(blocksize=128)[0]
            start = end
    told = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - wall}
    save_file(out, target)
    config = make_config(options)
    order_taken = "activation" if config.desc_act else "groups" if config.act_group_aware else None
    print(json.dumps(told | {"act-order": order_taken, "damping": config.damp_percent}))


def make_config(options: dict[str, Any]) -> QuantizeConfig:
    """Symmetric, groups of 128."""
    return QuantizeConfig(bits=4, group_size=128, sym=True, **options)


def make_task(weight: torch.Tensor, options: dict[str, Any]) -> GPTQ:
    """Its worker for one matrix."""
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    task = GPTQ(module, make_config(options))
    task.quantizer.configure(perchannel=True)
    return task


if __name__ == "__main__":
    main(*sys.argv[1:])
