"""Models at their true sizes, of config.json alone: traced and planned in seconds, in less than 1 GB, to the weight."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aqtx.models.on_disk import text_config
from tests.true_configs import TRUE_CONFIGS

DEFAULT = "OLMoE-1B-7B"  # the others repeat what it shows, and take up to a minute
MEASURE = """
import json, sys, time
from pathlib import Path
from aqtx.machine.memory import peak_bytes
from aqtx.program.accounting import original_bytes
from aqtx.runs.plan_only import plan_recipe
from aqtx.runs.recipe import load_recipe
folder, started = Path(sys.argv[1]), time.process_time()
overrides = [f"model.source={folder}", f"output={folder / 'out'}", "passes.1.assign_plan.average_bits=4.5"]
planned = plan_recipe(load_recipe("quickstart", overrides), config_only=True, quiet=True)
weights, entries = planned.program.weights, planned.plan.sites.values()
print(json.dumps({
    "cpu_seconds": time.process_time() - started,
    "elements": sum(spec.numel for name, spec in weights.specs.items() if name not in weights.tied),
    "peak_bytes": peak_bytes(),
    "bytes": original_bytes(planned.program),
    "bits": planned.plan.average_bits,
    "kept": sorted({entry.category for entry in entries if entry.format is None}),
    "planned": sorted({entry.category for entry in entries if entry.format is not None}),
}))
"""


def elements(config: dict[str, Any]) -> int:
    """Weights of transformers' model of a text config: parameters and stored buffers, a tied head once."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    stored = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()
    }
    return sum(value.numel() for value in stored.values())


@pytest.mark.parametrize(
    "name", [name if name == DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in TRUE_CONFIGS]
)
def test_planned_from_the_config_alone(name: str, tmp_path: Path) -> None:
    """The whole process, PyTorch included, stays below 1 GB while 4 to 1342 GB of weights are on meta."""
    (tmp_path / "config.json").write_text(json.dumps(TRUE_CONFIGS[name]))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["elements"] == elements(text_config(TRUE_CONFIGS[name]))
    assert 2 * measured["elements"] <= measured["bytes"] < 2.002 * measured["elements"], "routers in float32"
    assert measured["peak_bytes"] < 1_000_000_000
    assert measured["cpu_seconds"] < 120
    assert measured["bits"] <= 4.5
    assert not {"router", "lm_head"} & {*measured["planned"]}
