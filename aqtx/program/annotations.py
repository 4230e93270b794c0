"""What can be written on a site: every annotation by name, with its meaning and the type of its JSON value.

`Site.get` and `Site.set` know these names only, so that a misspelt one is an error and not a missing value. A name with
`<...>` in it stands for a family: `rotation_<block>_<activations>` is known as `rotation_32_none`.
"""

import re
from dataclasses import dataclass
from typing import Any

from aqtx.errors import nearest


@dataclass(frozen=True)
class Annotation:
    """One thing that passes may say of a site. A value is of `kind`, or None where there is nothing to say."""

    name: str
    kind: type
    meaning: str


ANNOTATIONS: dict[str, Annotation] = {}


def declare(name: str, kind: type, meaning: str) -> str:
    """Make a name known; returns it. A name that is known with another type or meaning is refused."""
    annotation = Annotation(name, kind, meaning)
    if ANNOTATIONS.setdefault(name, annotation) != annotation:
        raise ValueError(f"annotation {name!r} is declared twice: {ANNOTATIONS[name].meaning} and {meaning}")
    return name


def known(name: str) -> Annotation:
    """The annotation of this name or of the family that it belongs to.

    Raises:
        KeyError: there is none.
    """
    found = ANNOTATIONS.get(name) or next((each for each in ANNOTATIONS.values() if _is_member(name, each.name)), None)
    if found is None:
        raise KeyError(f"no annotation is called {name!r}{nearest(name, ANNOTATIONS)}; declare it first")
    return found


def check(name: str, value: Any) -> None:
    """Refuse an unknown name, and a value of another type than the name's.

    Raises:
        KeyError: the name is unknown.
        TypeError: the value is neither None nor of the type.
    """
    kind = known(name).kind
    if value is not None and type(value) is not kind:
        raise TypeError(f"annotation {name!r} holds {kind.__name__}, not {type(value).__name__}")


def _is_member(name: str, family: str) -> bool:
    pattern = re.sub(r"<\w+>", "[^<>]+", family)
    return pattern != family and re.fullmatch(pattern, name) is not None


for _row in (
    # what matrices are like
    ("alpha", float, "exponent of the tail of the matrix's spectrum; none where it is degenerate"),
    (
        "alpha_info",
        dict,
        "how alpha was found: k_used, n_eigs, method; reason it is degenerate; raw, of all eigenvalues",
    ),
    ("error", dict, "format -> ||W - Q(W)||^2 / ||W||^2"),
    ("energy", float, "||W||^2"),
    # what calibration text says
    ("hessian", dict, "format -> sum of squared errors, each weighted by its input channel's mean square"),
    ("frequency", float, "share of the tokens that reach the matrix; 1 outside experts"),
    ("gate_weight", float, "an expert's gate scores summed over its tokens, per token of the text; 1 outside experts"),
    ("fisher", dict, "format -> predicted divergence, along each rounding error; nats per token"),
    (
        "fisher_element",
        dict,
        "format -> predicted divergence by the Fisher information's diagonal; nats per token",
    ),
    ("fisher_matrix", dict, "format -> predicted divergence by the diagonal's mean over the matrix; nats per token"),
    ("<fisher>_domains", dict, "domain of the text -> format -> what the annotation <fisher> says of it alone"),
    ("trial", dict, "format -> relative squared change of the block's output when the matrix alone is rounded"),
    ("trial_loss", dict, "format -> divergence of predictions when the matrix alone is rounded; nats per token"),
    ("calibrated", float, "logarithm of the loss per unit of squared error, by alpha fitted to this model"),
    ("rotation_<block>_<activations>", dict, "format -> [plain, rotated] squared errors of the block's output"),
    # what was decided
    ("format", str, "the plan's format of the weights; none where they are kept"),
    ("outer_scale", list, "sites whose matrices share NVFP4's scale per matrix with it, itself among them"),
    ("activation", str, "the plan's format of the inputs; none where they stay as they are"),
    ("why", str, "why the plan says so; empty where the method decided"),
    ("rotation", dict, "block of the rotation that the plan asks for before the matrix"),
):
    declare(*_row)
