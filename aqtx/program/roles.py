"""The role of a weight matrix, read off its name, and the groups of roles that a recipe may keep."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from aqtx.errors import InputError, nearest

_ROLES = (  # first match wins
    ("lm_head", r"(^|\.)(lm_head|embed_out)$"),
    ("shared_expert_gate", r"\.shared_expert_gate$"),
    ("shared_expert", r"\.shared_experts?\."),
    ("router", r"\.(mlp|block_sparse_moe|feed_forward|ffn)\.(gate|router)(\.layer)?$"),
    ("attn_q", r"\.q_proj$"),
    ("attn_k", r"\.k_proj$"),
    ("attn_v", r"\.v_proj$"),
    ("attn_o", r"\.(self_attn|self_attention|attention|attn)\.(o_proj|dense|out_proj)$"),
    ("attn_other", r"\.(self_attn|self_attention|attention|attn|linear_attn)\."),  # fused or low-rank q, k and v
    ("mlp_gate", r"\.(gate_proj|w1)$"),
    ("mlp_up", r"\.(up_proj|w3)$"),
    ("mlp_down", r"\.(down_proj|w2)$"),
)
CATEGORIES = (*(role for role, _ in _ROLES), "other")
GROUPS = {
    "attention": ("attn_q", "attn_k", "attn_v", "attn_o", "attn_other"),
    "router": ("router",),
    "shared_expert_gate": ("shared_expert_gate",),
    "lm_head": ("lm_head",),
}


def category_of(site: str) -> str:
    """The role of a site by its checkpoint name."""
    return next((role for role, pattern in _ROLES if re.search(pattern, site)), "other")


def layer_of(site: str) -> int | None:
    """The index of the block that a site belongs to, or None outside the blocks."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{site}")
    return int(found[1]) if found else None


def matcher(pattern: str) -> re.Pattern[str]:
    """For `search`: a glob over whole site names, where `*` crosses dots, or a regular expression behind `re:`.

    A glob starts where the name does: `1.mlp.gate` is no name of a site in layer 11.
    """
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else rf"\A{fnmatch.translate(pattern)}")
    except re.error as error:
        raise InputError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def hint_for(pattern: str, names: Sequence[str], words: Iterable[str] = ()) -> str:
    """What somebody may have meant by a pattern that matches none of the names."""
    if not pattern.startswith("re:") and any(matcher(f"*{pattern}").search(name) for name in names):
        return f", did you mean '*{pattern}'? A pattern is for whole names"
    return nearest(pattern, words) or nearest(pattern, names) or (f", the first site is {names[0]!r}" if names else "")


def select(names: Iterable[str], selectors: Iterable[str], where: str) -> dict[str, str]:
    """{site: selector} for the sites that group names or patterns select; each pattern must match.

    A group name (`attention`, `router`, ...) may be empty in a model. All problems are raised at once.
    """
    names, chosen, problems = list(names), {}, []
    for selector in selectors:
        if selector in GROUPS or selector in CATEGORIES:
            roles = GROUPS.get(selector, (selector,))
            hits = [name for name in names if category_of(name) in roles]
        else:
            try:
                pattern = matcher(selector)
            except InputError as error:
                problems += [f"{where}: {problem}" for problem in error.problems]
                continue
            hits = [name for name in names if pattern.search(name)]
            if not hits:
                hint = hint_for(selector, names, [*GROUPS, *CATEGORIES])
                problems.append(f"{where}: {selector!r} matches no site{hint}")
        chosen.update(dict.fromkeys(hits, selector))
    if problems:
        raise InputError(*problems)
    return chosen
