"""The roles of weight matrices, the groups of roles that a recipe may name, and the role that a name tells.

What a matrix does in the graph goes first (`roles_by_use.py`); a name decides where the graph shows nothing.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from aqtx.errors import InputError, nearest

_ROLES = (  # first match wins
    ("lm_head", r"(^|\.)(lm_head|embed_out)$"),
    ("shared_expert_gate", r"\.shared_expert_gate$"),
    ("shared_expert", r"\.(shared_experts?|shared_mlp)\."),
    ("router", r"\.(mlp|block_sparse_moe|feed_forward|ffn)\.(gate|router)(\.layer)?$"),
    ("attn_q", r"\.q_proj$"),
    ("attn_k", r"\.k_proj$"),
    ("attn_v", r"\.v_proj$"),
    ("attn_o", r"\.(self_attn|self_attention|attention|attn)\.(o_proj|dense|out_proj)$"),
    ("linear_attn_out", r"\.linear_attn\.out_proj$"),
    ("linear_attn_in", r"\.linear_attn\."),
    ("attn_qkv", r"\.(self_attn|self_attention|attention|attn)\.(qkv_proj|qkv|query_key_value|Wqkv|c_attn)$"),
    ("attn_other", r"\.(self_attn|self_attention|attention|attn)\."),
    ("mlp_gate", r"\.(gate_proj|w1)$"),
    ("mlp_up", r"\.(up_proj|w3)$"),
    ("mlp_down", r"\.(down_proj|w2)$"),
)
# Of a plain feed-forward, its role where a model has experts in other layers.
SHARED_LIKE = {"mlp_gate": "dense_gate", "mlp_up": "dense_up", "mlp_down": "dense_down"}
CATEGORIES = (
    *("lm_head", "router", "shared_expert_gate", "shared_expert"),
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_latent", "attn_gate", "attn_o", "attn_other"),
    *("linear_attn_in", "linear_attn_out"),
    *("dense_gate", "dense_up", "dense_down", "mlp_gate", "mlp_up", "mlp_down", "other"),
)
GROUPS = {
    "attention": tuple(role for role in CATEGORIES if role.startswith(("attn_", "linear_attn_"))),
    "linear_attention": ("linear_attn_in", "linear_attn_out"),
    "dense_layers": ("dense_gate", "dense_up", "dense_down"),
    "router": ("router",),
    "shared_expert_gate": ("shared_expert_gate",),
    "lm_head": ("lm_head",),
    "mlp_gate": ("mlp_gate", "dense_gate"),
    "mlp_up": ("mlp_up", "dense_up"),
    "mlp_down": ("mlp_down", "dense_down"),
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


def select(names: Iterable[str] | Mapping[str, str], selectors: Iterable[str], where: str) -> dict[str, str]:
    """{site: selector} for the sites that group names or patterns select; each pattern must match.

    `names` may map to categories; without, names tell them. A group name (`attention`, `router`, ...) may be empty in
    a model. All problems are raised at once.
    """
    category = names.__getitem__ if isinstance(names, Mapping) else category_of
    names, chosen, problems = list(names), {}, []
    for selector in selectors:
        if selector in GROUPS or selector in CATEGORIES:
            roles = GROUPS.get(selector, (selector,))
            hits = [name for name in names if category(name) in roles]
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
