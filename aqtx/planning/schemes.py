"""The keys of one scheme of a manual plan (`wq`, `aq`, `group_size`, `extra`) -> canonical format names."""

from typing import Any

from aqtx.errors import InputError
from aqtx.formats.table import ALIASES, BF16_SCALE, GROUPS, parse

SCHEME_KEYS = ("wq", "aq", "group_size", "skip", "comment", "extra", "alpha_hill", "category")
_NO_FORMAT = ("none", "bf16", "bfloat16", "fp16", "float16", "skip")
_VARIANTS = {"fp6": ("e2m3", "e3m2"), "mxfp6": ("e2m3", "e3m2"), "fp8": ("e4m3", "e5m2"), "mxfp8": ("e4m3", "e5m2")}


class SchemeReader:
    """Reads schemes one after the other; collects problems, and counts groups that a format cannot honour."""

    def __init__(self) -> None:
        self._refused: dict[str, list[str]] = {}  # what is wrong -> the sites that it holds for
        self._fixed_blocks: set[str] = set()

    @property
    def problems(self) -> list[str]:
        """One sentence for each thing that is wrong, however many sites a pattern carries it to."""
        more = {problem: len(sites) - 1 for problem, sites in self._refused.items()}
        return [
            f"plan, {sites[0]}{f' and {more[problem]} more sites' if more[problem] else ''}: {problem}"
            for problem, sites in self._refused.items()
        ]

    def warnings(self) -> list[str]:
        """One sentence for all group sizes that fell to a fixed block."""
        if not self._fixed_blocks:
            return []
        count = len(self._fixed_blocks)
        return [f"group_size other than 32 was given for {count} sites with MX formats: their block stays 32"]

    def format_name(self, site: str, name: object, keys: dict[str, Any]) -> str | None:
        """The canonical name of a weight or activation format with its group, or None for no quantization."""
        word = str(name).strip().lower()
        if word in _NO_FORMAT:
            return "bf16" if word in ("bf16", "bfloat16") and name is keys.get("wq") else None
        try:
            return self._grouped(site, self._variant(word, keys), keys.get("group_size"))
        except InputError as error:
            for problem in error.problems:
                self._refused.setdefault(problem, []).append(site)
            return None

    def _variant(self, word: str, keys: dict[str, Any]) -> str:
        """`extra: {format: e3m2}` picks the element of a name that leaves it open."""
        extra = keys.get("extra") or {}
        if not isinstance(extra, dict):
            raise InputError(f"extra must be a mapping such as {{format: e3m2}}, not {extra!r:.80}")
        asked = extra.get("format")
        if asked is None or word not in _VARIANTS:
            return word
        if asked not in _VARIANTS[word]:
            if any(asked in _VARIANTS.get(str(keys.get(other)).lower(), ()) for other in ("wq", "aq")):
                return word  # it is meant for the other of the two
            raise InputError(f"extra.format {asked!r} is none of {', '.join(_VARIANTS[word])} for {word}")
        return f"{word}_{asked}"

    def _grouped(self, site: str, word: str, group_size: int | None) -> str:
        fmt = parse(word)
        if group_size is not None and type(group_size) is not int:
            raise InputError(f"group_size must be a whole number, not {group_size!r:.80}")
        plain = "_g" not in word and "_row" not in word
        if group_size is None or not plain:
            return fmt.name
        if fmt.scale is not BF16_SCALE:
            if fmt.is_packed and group_size != fmt.block:
                self._fixed_blocks.add(site)
            return fmt.name
        if group_size != -1 and group_size not in GROUPS:
            raise InputError(f"group_size {group_size} is none of -1 (whole rows), {', '.join(map(str, GROUPS))}")
        base, _, rule = word.partition("@")
        base, asymmetric = base.removesuffix("_asym"), "_asym" if base.endswith("_asym") else ""
        group = "_row" if group_size == -1 else f"_g{group_size}"
        return parse(f"{ALIASES.get(base, base)}{group}{asymmetric}{'@' + rule if rule else ''}").name
