"""What to measure: the `evaluate` section of a recipe and the options of `aqtx eval`."""

from dataclasses import dataclass

from aqtx.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What to measure of a model. `perplexity` names a text source, `tasks` are lm-eval's."""

    perplexity: str | None = None
    max_tokens: int | None = None  # of text; whole documents, domains in turn; null takes all
    window: int | None = None  # tokens that the model is given at a time; null takes the model's context, at most 2048
    batch_size: int = 8
    tasks: tuple[str, ...] = ()
    include_path: str | None = None  # folder of further task definitions
    allow_task_code: bool = False  # run the Python that those definitions name
    limit: int | None = None  # items per task; null takes all
    num_fewshot: int | None = None  # examples in a task's prompt; null takes the task's own

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        counts = {name: getattr(self, name) for name in ("max_tokens", "window", "batch_size", "limit")}
        low = [f"{name}: must be at least 1, got {n}" for name, n in counts.items() if n is not None and n < 1]
        if self.num_fewshot is not None and self.num_fewshot < 0:
            low.append(f"num_fewshot: must be at least 0, got {self.num_fewshot}")
        if low:
            raise InputError(*low)
