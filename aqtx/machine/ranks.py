"""One run on several processes: `torchrun --nproc-per-node N -m aqtx apply ...`.

All ranks run the same passes on the same program. What they share is calibration and evaluation text, of
which each runs its own batches, and the solving of a layer's experts, of which each solves some; sums and codes
are exchanged, so that every rank goes on with the same weights. Rank 0 alone writes.
With one process all of this does nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[Sequence[Any]], Iterable[Any]]
_PATIENCE = timedelta(days=2)  # a rank that dies is noticed at once; one that works may take long


class LostRank(RuntimeError):
    """Another rank has died or was stopped."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `size`-th item, beginning with this rank's."""
        return items[self.rank :: self.size]

    def owns(self, index: int) -> bool:
        """Whether the index-th piece of work is this rank's."""
        return index % self.size == self.rank

    def own_folder(self, folder: Path) -> Path:
        """A folder of this rank's own; rank 0 has the given one."""
        return folder if self.leads else folder / f"rank-{self.rank}"

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over ranks; the sum is the same, bit for bit, on all."""
        self._reduce("SUM", tensors)

    def take_largest(self, *tensors: Tensor) -> None:
        """Replace each tensor by its elementwise maximum over ranks."""
        self._reduce("MAX", tensors)

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return min(self.gather(number))

    def all_agree(self, found: bool) -> bool:
        """Whether it is so on every rank."""
        return all(self.gather(found))

    def gather(self, item: Item) -> list[Item]:
        """Every rank's item, in the order of ranks."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        with naming_the_lost():
            dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def share(self, work: Callable[[Item], Result], items: Sequence[Item], *, progress: Progress) -> list[Result]:
        """`work` of every item in the items' order, each done by one rank; results are pickled between ranks."""
        parts = self.gather([work(item) for item in progress(self.mine(items))])
        return [parts[place % self.size][place // self.size] for place in range(len(items))]

    def _reduce(self, operation: str, tensors: Sequence[Tensor]) -> None:
        if self.size == 1:
            return
        import torch.distributed as dist

        with naming_the_lost():
            for tensor in tensors:
                dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with naming_the_lost():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turn what the communication library says into a sentence.

    Raises:
        LostRank: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise LostRank(
            f"another rank of this run is gone, so rank {os.environ.get('RANK', '?')} stops too; "
            f"the same command with --resume goes on from the last finished block ({reason})"
        ) from error
