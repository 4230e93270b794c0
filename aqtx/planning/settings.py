"""The fields of `assign_plan`, and what can be said against them without a model."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from aqtx.formats.table import Format, parse
from aqtx.numerics.hadamard import is_order
from aqtx.planning.groups import group_problems
from aqtx.sensitivity.fisher import Detail
from aqtx.sensitivity.selection import format_problems

Method = Literal[
    "alpha",
    "error",
    "alphaq",
    "hessian",
    "pmq",
    "fisher",
    "trial",
    "calibrated",
    "random",
    "search",
    "uniform",
    "even",
    "front_back",
    "ratio",
    "threshold",
    "manual",
]
NEED_TEXT = ("hessian", "pmq", "fisher", "trial", "calibrated", "search")  # they look at calibration text
BaseMethod = Literal["alpha", "error", "hessian", "pmq", "fisher", "trial", "calibrated"]
DEFAULT_KEEP = ("attention", "router", "shared_expert_gate", "lm_head")
_OWN_SIZE = ("ratio", "threshold", "manual")  # the size follows from the method's own fields
_BUDGET_OPTIONAL = ("uniform", "front_back", "search")
_DEFAULT_GAMMA = {"alpha": 0.25, "alphaq": 12.0}
_DEFAULT_CANDIDATES = {
    "ratio": ("mxfp4", "mxfp8", "bf16"),
    "threshold": ("mxfp4", "mxfp8"),
    "front_back": ("mxfp4", "mxfp8"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to plan.

    Fields:
        method: where the bits go.
            These solve for the least cost under the budget, their costs stand in aqtx/sensitivity/costs.py:
            `error` measured error alone, `alpha` weighted by alpha, `alphaq` the published objective with its
            count of nominal bits, `hessian` error weighted by the inputs' strength, `pmq` by routing, `fisher`
            (the default) the divergence that gradients predict, `trial` that of rounding each matrix alone,
            `calibrated` error weighted by alpha fitted to this model, `random` a seeded baseline. `search`
            lowers the bits of `base` as far as a perplexity ceiling allows.
            These need no costs: `uniform` the largest candidate that fits, `even` two neighbouring formats
            spread evenly, `front_back` one half of the depth above the other, `ratio` shares of the matrices
            in order of alpha, `threshold` one alpha as the border, `manual` what a file says.
        candidates: formats to choose from; default mxfp4, mxfp6, mxfp8; of `ratio` mxfp4, mxfp8, bf16; of
            `threshold` and `front_back` mxfp4, mxfp8.
        average_bits: stored bits per planned weight, scales included. Kept sites are outside it.
        budget_bytes: bytes of all stored tensors, kept ones included. Give this or average_bits.
        keep: categories (`attention`, `router`, ...) and patterns of sites that stay as they are. Default:
            attention, router, shared_expert_gate and lm_head; nothing for `manual`, whose file decides.
        activations: `none`, or the format into which each token's inputs of planned sites are rounded.
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
        trial_sequences: of `trial`, and of `calibrated` where it is fitted to trials: sequences to run them on.
        num_trials: of `calibrated`: matrices to try, spread over the roles.
        fit_to: of `calibrated`: what alpha is fitted to, `fisher` of all matrices or `trial` of a sample.
        base: of `search`: the method that plans each candidate.
        perplexity_ceiling: of `search`: the highest perplexity on calibration text, as a multiple of the model's own.
        search_steps: of `search`: models to evaluate.
        plan: of `manual`: a JSON file or its content.
    """

    method: Method = "fisher"
    candidates: tuple[str, ...] | None = None
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
    trial_sequences: int = 4
    num_trials: int = 24
    fit_to: Literal["fisher", "trial"] = "fisher"
    base: BaseMethod = "alpha"
    perplexity_ceiling: float = 1.05
    search_steps: int = 6
    plan: str | dict[str, Any] | None = None

    @property
    def formats(self) -> list[Format]:
        """The candidates, smallest element first, then those that only a pin names."""
        names = self.candidates or _DEFAULT_CANDIDATES.get(self.method, ("mxfp4", "mxfp6", "mxfp8"))
        candidates = {parse(name).name: parse(name) for name in names}
        pinned = {parse(name).name: parse(name) for name in self.pins.values()}
        ordered = sorted(candidates.values(), key=lambda fmt: fmt.bits((4096, 4096)))
        return ordered + [fmt for name, fmt in pinned.items() if name not in candidates]

    @property
    def num_candidates(self) -> int:
        """How many of `formats` any site may take."""
        names = self.candidates or _DEFAULT_CANDIDATES.get(self.method, ("mxfp4", "mxfp6", "mxfp8"))
        return len({parse(name).name for name in names})

    @property
    def kept_selectors(self) -> tuple[str, ...]:
        """What stays as it is."""
        if self.keep is not None:
            return self.keep
        return () if self.method == "manual" else DEFAULT_KEEP

    @property
    def strength(self) -> float:
        """Gamma with its default, negative where high alphas earn bits."""
        gamma = self.gamma if self.gamma is not None else _DEFAULT_GAMMA.get(self.method, 0.0)
        return gamma if self.direction == "low_alpha_high_bits" else -gamma

    def without_text(self) -> Self:
        """The same by a method that looks at no text: to it all Gaussian matrices are alike, as to the error."""
        return replace(self, method="error") if self.method in NEED_TEXT else self

    def problems(self) -> list[str]:
        """What is wrong, in sentences."""
        formats = (*(self.candidates or ()), *self.pins.values())
        if self.activations != "none":
            formats = (*formats, self.activations)
        return [
            *format_problems(formats, "a format of the plan"),
            *group_problems(self.groups),
            *self._field_problems(),
        ]

    def _field_problems(self) -> Iterable[str]:
        yield from self._budget_problems()
        if self.candidates is not None and not self.candidates:
            yield "candidates is empty; name at least one format."
        if self.gamma is not None and self.gamma < 0:
            yield "gamma is negative; set direction to reverse it."
        if min(self.mxfp4_ratio, self.bf16_ratio) < 0 or self.mxfp4_ratio + self.bf16_ratio > 1:
            yield "mxfp4_ratio and bf16_ratio are shares: neither is negative and together they are at most 1."
        if self.method == "threshold" and self.alpha_threshold is None:
            yield "method threshold needs alpha_threshold."
        if (self.method == "manual") != (self.plan is not None):
            yield "plan, a JSON file or its content, goes with method manual and only with it."
        if self.rotate == "auto" and self.method == "manual":
            yield "rotate auto goes with methods that decide; for manual name the sites to insert_hadamard."
        if self.rotation_block < 2 or not is_order(self.rotation_block):
            yield f"rotation_block: no Hadamard matrix of order {self.rotation_block} is known; take 16, 32, 64 or 128."
        for key in ("fisher_sequences", "trial_sequences", "num_trials", "search_steps"):
            if getattr(self, key) < 1:
                yield f"{key} is below 1."
        if self.perplexity_ceiling < 1:
            yield "perplexity_ceiling is a multiple of the model's own perplexity: at least 1."
        for key, bits in (self.min_bits | self.max_bits).items():
            if not 0 < bits <= 16:
                yield f"min_bits and max_bits: {key!r} has {bits:g} bits, which no format has."

    def _budget_problems(self) -> Iterable[str]:
        given = [key for key in ("average_bits", "budget_bytes") if getattr(self, key) is not None]
        if len(given) == 2:
            yield "average_bits and budget_bytes are both given; exactly one is."
        if self.method in _OWN_SIZE and given:
            yield f"method {self.method} takes no {given[0]}: its own fields decide the size."
        if self.method not in (*_OWN_SIZE, *_BUDGET_OPTIONAL) and not given:
            yield f"method {self.method} needs average_bits or budget_bytes."
        if self.method == "alphaq" and self.budget_bytes is not None:
            yield "method alphaq counts nominal bits per matrix: give average_bits."
        if self.cost_model == "active" and self.budget_bytes is not None:
            yield "cost_model active counts bytes read per token, not stored ones: give average_bits."
        for key in given:
            if getattr(self, key) <= 0:
                yield f"{key} is not positive."
