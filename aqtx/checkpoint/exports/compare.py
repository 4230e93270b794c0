"""Values that were written against the values that were meant."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Checked:
    """What verification found: every value that was compared, those that differ, and by how much at most.

    `allowed` values differ as the form makes them (a minimum in half precision) and are told, not refused.
    """

    values: int = 0
    allowed: int = 0
    worst: float = 0.0
    names: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def complete(self, written: Iterable[str]) -> None:
        """Whether what was written are the names that were compared, and no others."""
        self.problems += [f"{key} is one too many" for key in sorted(set(written) - self.names)]
        self.problems += [f"{key} is missing" for key in sorted(self.names - set(written))]


def compare(checked: Checked, key: str, written: Tensor, own: Tensor, allowed: Tensor | float = 0.0) -> None:
    """Count and compare; a difference within `allowed` is told, any other is a problem, and so is NaN."""
    checked.names.add(key)
    checked.values += own.numel()
    if written.shape != own.shape:
        checked.problems.append(f"{key} has the shape {list(written.shape)} instead of {list(own.shape)}")
        return
    difference = (written.double() - own.double()).abs()
    wrong = ~(difference <= allowed)
    checked.allowed += int((difference > 0).sum() - (wrong & (difference > 0)).sum())
    checked.worst = max(checked.worst, float(difference.nan_to_num(float("inf")).max())) if difference.numel() else 0.0
    if bool(wrong.any()):
        checked.problems.append(f"{key}: {int(wrong.sum())} of {own.numel()} values differ")
