"""How far a backward pass over the blocks has come, so that a killed run goes on there.

One file holds what is not computed again: the sums of all sites so far, and the gradients that flow out of the last
block done, of all batches. It is replaced block by block, under a second name first: it is whole or absent.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from aqtx.blockwise.backward import Backward
from aqtx.machine.tensor_record import load_tensors, save_tensors
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request

_GRADIENT = "gradient"
_SUMS = "sums"


@dataclass(frozen=True)
class FisherRecord:
    """The record of one measurement below a run's work folder; without one nothing is kept."""

    file: Path | None
    context: Context

    @classmethod
    def of(cls, wanted: Sequence[Request], ids: Tensor, context: Context, detail: str) -> "FisherRecord":
        """Named for what is measured: sites, formats, text, seed and which detail of F."""
        if context.work is None:
            return cls(None, context)
        told = [[site.name, [fmt.name for fmt in formats]] for site, formats in wanted]
        asked = json.dumps([told, ids.tolist(), context.seed, detail])
        return cls(context.work / f"fisher-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors", context)

    def save(self, block: int, sums: dict[str, Tensor], backward: Backward) -> None:
        """A block is done."""
        if self.file is None:
            return
        tensors = {f"{_SUMS}/{name}": value for name, value in sums.items()}
        for batch in backward.runner.batches:
            for name, value in backward.gradients.get(str(batch), self.context.device).items():
                tensors[f"{_GRADIENT}/{batch}/{name}"] = value
        save_tensors(self.file, tensors, block)

    def load(self, sums: dict[str, Tensor], backward: Backward) -> int | None:
        """The last block done, its sums and gradients restored; None where the measurement begins anew.

        Ranks go on only where all of them stand at one block.
        """
        found = None if self.file is None else load_tensors(self.file)
        blocks = self.context.ranks.gather(None if found is None else found[1])
        if found is None or len(set(blocks)) > 1:
            return None
        tensors, block = found
        gradients: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == _SUMS:
                sums[name].copy_(value)
            else:
                place, _, node = name.partition("/")
                gradients.setdefault(place, {})[node] = value
        for batch in backward.runner.batches:
            backward.gradients.put(str(batch), gradients.get(str(batch), {}))
        return int(block)
