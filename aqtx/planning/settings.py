"""The fields of `assign_plan`, and what can be said against them without a model."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self

import aqtx.planning.methods  # noqa: F401  (registers the methods)
from aqtx.errors import InputError, nearest, problems_of
from aqtx.formats.table import Format, expand, parse
from aqtx.numerics.hadamard import is_order
from aqtx.planning.groups import group_problems
from aqtx.planning.method import METHODS, STANDARD, Method
from aqtx.registry import OneOf
from aqtx.sensitivity.fisher import Detail
from aqtx.sensitivity.selection import format_problems

_OF_TARGETS = {
    "vllm": ("groups",),
    "transformers": ("groups",),
    "llama.cpp": ("k", "mxfp4", "int4_g32", "int5_g32", "int8_g32"),
}
_TOLD_APART = (
    "average_bits",
    "budget_bytes",
    "plan",
    "prior",
    "groups",
)  # given in vain, they are problems of their own


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to plan.

    Fields:
        method: where the bits go; `aqtx ls methods` tells of each, and which of these keys it reads.
        candidates: formats to choose from; default mxfp4, mxfp6, mxfp8; of `ratio` mxfp4, mxfp8, bf16; of
            `threshold` and `front_back` mxfp4, mxfp8. A list may name sets: `mx` (these three), `int` (INT3, 4, 6 and
            8 in groups of 64), `all` (both and nvfp4), `groups` (INT2 to INT8 in groups of 32 to 128, so that few sites
            can fill a budget; default for vllm and transformers), `k` (q3_k to q6_k; default for llama.cpp with mxfp4,
            int4_g32, int5_g32 and int8_g32, which are for rows that are no multiples of 256).
        target: what will run the model. `vllm`, `llama.cpp` and `transformers` fuse matrices, which then share one
            format, and lack some formats; the budget counts the bytes of what they load. `aqtx` allows every plan.
        average_bits: stored bits per planned weight, scales included. Kept sites are outside it.
        budget_bytes: bytes of all stored tensors, kept ones included. Give this or average_bits.
        keep: categories (`attention`, `router`, ...) and patterns of sites that stay as they are. Default:
            attention, router, shared_expert_gate and lm_head; nothing for `manual`, whose file decides.
        activations: `none`, or the format into which each token's inputs of planned sites are rounded. Of MX,
            `mxfp8@rceil` and `mxfp4@even` lose less than OCP's own rule, which a name without a rule means.
        rotate: `auto` measures on 4,096 tokens of calibration text what a Hadamard rotation of each input gains, and
            decides formats and rotations together; `insert_hadamard: {before: [plan]}` and `fuse_hadamard` then carry
            it out.
        rotation_block: width of the rotation's blocks.
        direction: whether a low alpha earns more bits (the literature's reading) or a high one does.
        gamma: how strongly alpha weighs: cost s_l = exp(-gamma z_l), default 0.25; for `alphaq` the exponent, 12.
        normalize: z-scores over `all` planned sites, or within each `category`.
        cost_model: the budget counts bytes that are stored (`storage`) or read per token (`active`): an
            expert counts by the share of tokens that it sees on average.
        prove: prove the optimum; otherwise stop at a gap of 1e-3.
        groups: sites that share one format: `qkv`, `gate_up`, `experts` (all of a layer), `vllm` (all three),
            or `re:` and a regular expression: sites with equal captures form a group.
        pins: site or pattern -> format; wins over `keep`.
        min_bits, max_bits: category or pattern -> least or most bits of an element code.
        mxfp4_ratio, bf16_ratio: of `ratio`: the shares that get the smallest and the largest tier.
        alpha_threshold: of `threshold`.
        half: of `front_back`: which half gets more bits.
        seed: of `random` and of what is sampled; default the recipe's.
        fisher_sequences: of `fisher`: calibration sequences to take gradients of.
        fisher_detail: `direction` along each format's error; of the diagonal alone `element`, or its mean `matrix`.
        objective: of `fisher`, where calibration text has several domains: the least loss in their weighted `mean`, or
            in the `worst_domain`, held against what that domain would lose under its own best plan.
        rounds: of `fisher` along errors: 2 measures once more with the weights of the first plan, and plans by that.
        trial_sequences: of `trial`, and of `calibrated` where it is fitted to trials: sequences to run them on.
        num_trials: of `calibrated`: matrices to try, spread over the roles.
        fit_to: of `calibrated`: what alpha is fitted to, `fisher` of all matrices or `trial` of a sample.
        base: of `search`: the method that plans each candidate.
        perplexity_ceiling: of `search`: the highest perplexity on calibration text, as a multiple of the model's own.
        search_steps: of `search`: models to evaluate.
        prior: of `prior`: plan.json of a smaller relative of the model, made by `fisher`, or a folder that holds one.
        plan: of `manual`: a JSON file or its content.
    """

    method: Annotated[str, OneOf(lambda: METHODS)] = "fisher"
    candidates: tuple[str, ...] | None = None
    target: Literal["aqtx", "vllm", "llama.cpp", "transformers"] = "aqtx"
    average_bits: float | None = None
    budget_bytes: int | None = None
    keep: tuple[str, ...] | None = None
    activations: str = "none"
    rotate: Literal["none", "auto"] = "none"
    rotation_block: int = 32
    direction: Literal["low_alpha_high_bits", "high_alpha_high_bits"] = "low_alpha_high_bits"
    gamma: float | None = None
    normalize: Literal["all", "category"] = "all"
    cost_model: Literal["storage", "active"] = "storage"
    prove: bool = True
    groups: tuple[str, ...] = ()
    pins: dict[str, str] = field(default_factory=dict)
    min_bits: dict[str, float] = field(default_factory=dict)
    max_bits: dict[str, float] = field(default_factory=dict)
    mxfp4_ratio: float = 0.3
    bf16_ratio: float = 0.0
    alpha_threshold: float | None = None
    half: Literal["front", "back"] = "front"
    seed: int | None = None
    fisher_sequences: int = 64
    fisher_detail: Detail = "direction"
    objective: Literal["mean", "worst_domain"] = "mean"
    rounds: int = 1
    trial_sequences: int = 4
    num_trials: int = 24
    fit_to: Literal["fisher", "trial"] = "fisher"
    base: Annotated[str, OneOf(lambda: [name for name, row in METHODS.items() if row.base and row.cost])] = "alpha"
    perplexity_ceiling: float = 1.05
    search_steps: int = 6
    prior: str | dict[str, Any] | None = None
    plan: str | dict[str, Any] | None = None

    @property
    def row(self) -> Method:
        """What is known of the method.

        Raises:
            InputError: there is none of this name.
        """
        if self.method not in METHODS:
            raise InputError(f"method: unknown {self.method!r}{nearest(self.method, METHODS)}")
        return METHODS[self.method]

    @property
    def rows(self) -> list[Method]:
        """The method, and the one that plans for it, if any."""
        return [self.row, *([METHODS[self.base]] if "base" in self.row.options else [])]

    @property
    def needs(self) -> tuple[str, ...]:
        """Annotations that an earlier pass must have made."""
        return tuple(need for row in self.rows for need in row.needs)

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is looked at."""
        return any(row.needs_text for row in self.rows)

    @property
    def own(self) -> dict[str, Any]:
        """The values of the keys that the method reads: it is given no others."""
        return {key: getattr(self, key) for key in sorted(self.row.keys)}

    @property
    def costed(self) -> Self:
        """The settings by which sites get their costs: those of `base` where the method has none of its own."""
        return replace(self, method=self.base) if "base" in self.row.options else self

    @property
    def formats(self) -> list[Format]:
        """The candidates, smallest element first, then those that only a pin names."""
        candidates = self._candidates
        pinned = {parse(name).name: parse(name) for name in self.pins.values()}
        ordered = sorted(candidates.values(), key=lambda fmt: fmt.bits((4096, 4096)))
        return ordered + [fmt for name, fmt in pinned.items() if name not in candidates]

    @property
    def num_candidates(self) -> int:
        """How many of `formats` any site may take."""
        return len(self._candidates)

    @property
    def _candidates(self) -> dict[str, Format]:
        names = self.candidates if self.candidates is not None else self.row.candidates
        if self.candidates is None and names == STANDARD:
            names = _OF_TARGETS.get(self.target, names)
        return {parse(name).name: parse(name) for name in expand(names)}

    @property
    def kept_selectors(self) -> tuple[str, ...]:
        """What stays as it is."""
        return self.row.keep if self.keep is None else self.keep

    def without_text(self) -> Self:
        """The same by a method that looks at no text: to it all Gaussian matrices are alike, as to the error."""
        return replace(self, method="error", objective="mean", rounds=1) if self.needs_text else self

    def on_assumed_costs(self) -> Self:
        """The same where no text and no weight is read: an optimum of costs that are alike is not worth a proof.

        To prove one for 15,000 matrices takes over a gigabyte and a minute.
        """
        return replace(self.without_text(), prove=False)

    def unread(self, also: Collection[str] = ()) -> list[str]:
        """A sentence for each key that differs from its default although the method does not read it.

        Args:
            also: keys that something else reads.
        """
        read = {key for row in self.rows for key in row.keys} | set(also) | set(_TOLD_APART)
        if self.rotate == "none":
            read.discard("rotation_block")
        given = [item.name for item in fields(Settings) if item.name not in read and not self._is_default(item.name)]
        return [f"{key}: {self._who_reads(key)}" for key in given]

    def _is_default(self, key: str) -> bool:
        item = Settings.__dataclass_fields__[key]
        value = getattr(self, key)
        return bool(value == (item.default_factory() if callable(item.default_factory) else item.default))

    def _who_reads(self, key: str) -> str:
        if key == "rotation_block":
            return "nothing reads it where rotate is none"
        readers = [name for name, row in sorted(METHODS.items()) if key in row.keys]
        return f"method {self.method} does not read it; {', '.join(readers) or 'none'} would"

    def problems(self) -> list[str]:
        """What is wrong, in sentences."""
        formats = (*expand(self.candidates or ()), *self.pins.values())
        if self.activations != "none":
            formats = (*formats, self.activations)
        if unknown := problems_of(lambda: self.rows):
            return unknown
        return [
            *format_problems(formats, "a format of the plan"),
            *group_problems(self.groups),
            *self._field_problems(),
        ]

    def _field_problems(self) -> Iterable[str]:
        yield from self._budget_problems()
        yield from self._candidate_problems()
        if self.gamma is not None and self.gamma < 0:
            yield "gamma is negative; set direction to reverse it."
        if min(self.mxfp4_ratio, self.bf16_ratio) < 0 or self.mxfp4_ratio + self.bf16_ratio > 1:
            yield "mxfp4_ratio and bf16_ratio are shares: neither is negative and together they are at most 1."
        if self.method == "threshold" and self.alpha_threshold is None:
            yield "method threshold needs alpha_threshold."
        if ("plan" in self.row.options) != (self.plan is not None):
            yield "plan, a JSON file or its content, goes with method manual and only with it."
        if any("prior" in row.options for row in self.rows) != (self.prior is not None):
            yield "prior, the plan of a relative, goes with method prior and only with it."
        if self.rotate == "auto" and "rotate" not in self.row.keys:
            yield f"rotate auto goes with methods that decide; for {self.method} name the sites to insert_hadamard."
        if self.objective != "mean" and self.row.domains is None:
            able = [name for name, row in sorted(METHODS.items()) if row.domains is not None]
            yield f"objective {self.objective} goes with methods that know costs by domain: {', '.join(able)}."
        elif self.objective != "mean" and self.rotate == "auto":
            yield f"objective {self.objective} does not go with rotate auto, which weighs all domains alike."
        if self.rounds > 1 and (self.row.again is None or self.fisher_detail != "direction"):
            yield "rounds: only method fisher with fisher_detail direction measures at a plan's weights."
        elif self.rounds > 1 and (self.objective != "mean" or self.rotate == "auto"):
            yield "rounds: above 1 it goes with objective mean and without rotate auto."
        if self.rotation_block < 2 or not is_order(self.rotation_block):
            yield f"rotation_block: no Hadamard matrix of order {self.rotation_block} is known; take 16, 32, 64 or 128."
        for key in ("rounds", "fisher_sequences", "trial_sequences", "num_trials", "search_steps"):
            if getattr(self, key) < 1:
                yield f"{key} is below 1."
        if self.perplexity_ceiling < 1:
            yield "perplexity_ceiling is a multiple of the model's own perplexity: at least 1."
        yield from self._limit_problems()

    def _limit_problems(self) -> Iterable[str]:
        for key, bits in (self.min_bits | self.max_bits).items():
            if not 0 < bits <= 16:
                yield f"min_bits and max_bits: {key!r} has {bits:g} bits, which no format has."
        for key in self.min_bits.keys() & self.max_bits.keys():
            if self.min_bits[key] > self.max_bits[key]:
                yield f"min_bits of {key!r}, {self.min_bits[key]:g}, is above its max_bits, {self.max_bits[key]:g}."

    def _candidate_problems(self) -> Iterable[str]:
        counts = self.row.counts
        if self.candidates is not None and not self.candidates:
            yield "candidates is empty; name at least one format."
        elif counts and not format_problems(expand(self.candidates or ()), "") and self.num_candidates not in counts:
            wanted = " or ".join(map(str, counts))
            yield f"method {self.method} needs {wanted} candidates, there are {self.num_candidates}."
        elif self.method == "ratio" and self.bf16_ratio > 0 and self.candidates and self.num_candidates == 2:
            yield "bf16_ratio: a top tier needs three candidates."
        if (self.groups or self.target != "aqtx") and self.row.choose is not None and not self.row.honours_groups:
            able = [name for name, row in sorted(METHODS.items()) if "groups" in row.keys]
            yield f"method {self.method} cannot honour groups, nor those of a target; {', '.join(able)} can."

    def _budget_problems(self) -> Iterable[str]:
        row = self.row
        given = [key for key in ("average_bits", "budget_bytes") if getattr(self, key) is not None]
        if len(given) == 2:
            yield "average_bits and budget_bytes are both given; exactly one is."
        if row.budget == "own" and given:
            yield f"method {self.method} takes no {given[0]}: its own fields decide the size."
        if row.budget == "required" and not given:
            yield f"method {self.method} needs average_bits or budget_bytes."
        if self.method == "uniform" and not given and (self.candidates is None or self.num_candidates > 1):
            yield "method uniform needs average_bits or budget_bytes to choose among several candidates."
        if row.nominal and self.budget_bytes is not None:
            yield f"method {self.method} counts nominal bits per matrix: give average_bits."
        if self.cost_model == "active" and self.budget_bytes is not None:
            yield "cost_model active counts bytes read per token, not stored ones: give average_bits."
        for key in given:
            if getattr(self, key) <= 0:
                yield f"{key} is not positive."
