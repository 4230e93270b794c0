"""What a recipe asks for as calibration text: one source or several with weights, and how it is cut or written."""

from dataclasses import dataclass, replace
from typing import Literal

from aqtx.errors import InputError

MOST_TOKENS = 2_000_000_000  # 16 GB of ids
WRITTEN = ("self", "ebss")  # sources that the model writes itself


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """The recipe's `calibration` section."""

    source: str | dict[str, float] = "builtin"  # or several, with what each weighs
    num_sequences: int = 64
    sequence_length: int = 256
    tau: float | None = None  # of the source ebss: the smaller, the more balanced; null is the published 1.2
    temperature: float = 1.0  # of the source self: what logits are divided by before a token is drawn
    starts: Literal["uniform", "frequency"] = "frequency"  # of the source self: how first tokens cover the vocabulary

    def __post_init__(self) -> None:
        """Refuse numbers that no text can be cut by, and a temperature that nothing reads."""
        least = {"num_sequences": 1, "sequence_length": 2}
        problems = [
            f"{name} is {getattr(self, name)}, but must be at least {value}"
            for name, value in least.items()
            if getattr(self, name) < value
        ]
        if not problems and self.num_tokens > MOST_TOKENS:
            problems.append(
                f"{self.num_sequences} sequences of {self.sequence_length} tokens are more than {MOST_TOKENS:,} tokens"
            )
        problems += _weight_problems(self.source)
        if self.tau is not None and "ebss" not in self.weights:
            problems.append(f"tau is of the source ebss, but the source is {self.source!r}: leave tau out")
        elif self.tau is not None and self.tau <= 0:
            problems.append(f"tau is {self.tau}, but must be above 0")
        if not 0 < self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}, but must be above 0")
        for name, default in (("temperature", 1.0), ("starts", "frequency")):
            if getattr(self, name) != default and "self" not in self.weights:
                problems.append(f"{name} is of the source self, but the source is {self.source!r}: leave {name} out")
        if problems:
            raise InputError(*problems)

    @property
    def weights(self) -> dict[str, float]:
        """Source -> what it weighs; one source weighs 1."""
        return {self.source: 1.0} if isinstance(self.source, str) else self.source

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return self.num_sequences * self.sequence_length

    def parts(self) -> dict[str, "CalibrationSpec"]:
        """Source -> what is asked of it alone: sequences in proportion to the weights, largest remainders first.

        Raises:
            InputError: a source would get no sequence.
        """
        total = sum(self.weights.values())
        exact = {name: self.num_sequences * weight / total for name, weight in self.weights.items()}
        counts = {name: int(value) for name, value in exact.items()}
        left = self.num_sequences - sum(counts.values())
        for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:left]:
            counts[name] += 1
        if empty := [name for name, count in counts.items() if not count]:
            raise InputError(
                f"calibration: of {self.num_sequences} sequences the weights give none to source {empty[0]!r}; raise "
                "num_sequences or its weight"
            )
        return {name: self._part(name, count) for name, count in counts.items()}

    def _part(self, source: str, count: int) -> "CalibrationSpec":
        """One source alone, without the keys of others."""
        return replace(
            self,
            source=source,
            num_sequences=count,
            tau=self.tau if source == "ebss" else None,
            temperature=self.temperature if source == "self" else 1.0,
            starts=self.starts if source == "self" else "frequency",
        )


def _weight_problems(source: str | dict[str, float]) -> list[str]:
    if isinstance(source, str):
        return []
    low = [
        f"source: the weight of {name!r} is {value:g}, but must be above 0"
        for name, value in source.items()
        if value <= 0
    ]
    return low if source else ["source: names no text; give one or more sources with their weights"]
