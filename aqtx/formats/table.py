"""The format table: one row per element code, and the grammar of format names.

A name is `ELEMENT[_gG|_row][_asym][@RULE]`: `int4`, `int4_g64_asym`, `int8_row`, `mxfp4@even`.
Everything that other modules know about a format they read from its row, so a new format is one
line of `_ROWS`. This module imports no torch: names are checked before anything heavy loads.

Sources: OCP Microscaling Formats v1.0 (section 5, MX), OCP 8-bit Floating Point v1.0 (E4M3, E5M2),
NVIDIA's NVFP4 (E2M1 in blocks of 16 under E4M3 scales and one fp32 scale per matrix), llama.cpp's K-quants (integers in
blocks of 16 or 32 whose scales, and minima, are codes under half-precision scales of 256 weights).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from aqtx.errors import InputError, nearest


@dataclass(frozen=True)
class Element:
    """A code of `bits` bits: an integer, or sign, exponent and mantissa."""

    name: str
    bits: int
    mantissa_bits: int = 0
    exponent_bias: int = 0
    largest: float = 0.0
    has_specials: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the code has an exponent."""
        return self.mantissa_bits > 0

    @property
    def max_exponent(self) -> int:
        """`emax`: the exponent of the largest normal value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share its spacing."""
        return 1 - self.exponent_bias


@dataclass(frozen=True)
class ScaleKind:
    """How blocks are scaled: stored bytes per block, rules (the first is the default).

    With `code_bits` a scale is itself a code of so many bits, under one half-precision scale for SUPER_BLOCK weights;
    `has_minimum`: so is an offset that is subtracted from the values, and codes are unsigned.
    """

    name: str
    num_bytes: int
    rules: tuple[str, ...]
    per_matrix_bytes: int = 0
    code_bits: int = 0
    has_minimum: bool = False


E8M0 = ScaleKind("e8m0", 1, ("floor", "even", "rceil", "search"))
BF16_SCALE = ScaleKind("bf16", 2, ("amax", "search"))
NVFP4_SCALE = ScaleKind("e4m3", 1, ("amax", "search"), per_matrix_bytes=4)
NO_SCALE = ScaleKind("none", 0, ("none",))
SUPER_BLOCK = 256
_K4M, _K6M = (ScaleKind(f"u{bits} + min", 0, ("search",), code_bits=bits, has_minimum=True) for bits in (4, 6))
_K6, _K8 = (ScaleKind(f"s{bits}", 0, ("search",), code_bits=bits) for bits in (6, 8))

_INTS = {bits: Element(f"int{bits}", bits, largest=2 ** (bits - 1) - 1) for bits in (2, 3, 4, 5, 6, 8)}
_E2M1 = Element("e2m1", 4, mantissa_bits=1, exponent_bias=1, largest=6.0)
_E2M3 = Element("e2m3", 6, mantissa_bits=3, exponent_bias=1, largest=7.5)
_E3M2 = Element("e3m2", 6, mantissa_bits=2, exponent_bias=3, largest=28.0)
_E4M3 = Element("e4m3", 8, mantissa_bits=3, exponent_bias=7, largest=448.0, has_specials=True)
_E5M2 = Element("e5m2", 8, mantissa_bits=2, exponent_bias=15, largest=57344.0, has_specials=True)
_BF16 = Element("bf16", 16)


@dataclass(frozen=True)
class Format:
    """One number format: `name` is its canonical string, `block` None means a whole row per scale."""

    name: str
    element: Element
    block: int | None
    scale: ScaleKind
    rule: str
    asymmetric: bool = False

    @property
    def is_packed(self) -> bool:
        """False only for bf16, which stores the values themselves."""
        return self.scale is not NO_SCALE

    def block_size(self, num_columns: int) -> int:
        """Weights under one scale in a row of `num_columns`: MX and NVFP4 blocks are padded, others shrink."""
        if self.block is None:
            return max(num_columns, 1)
        return self.block if self.scale is not BF16_SCALE else max(min(self.block, num_columns), 1)

    def num_blocks(self, num_columns: int) -> int:
        """Scales per row; the last block may be ragged."""
        return -(-num_columns // self.block_size(num_columns))

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of one row's codes on disk."""
        return -(-num_columns * self.element.bits // 8)

    def num_scale_codes(self, num_columns: int) -> int:
        """Codes of scales in a row, and of minima behind them; 0 where scales are no codes."""
        kind = self.scale
        return self.num_blocks(num_columns) * (1 + kind.has_minimum) if kind.code_bits else 0

    def num_supers(self, num_columns: int) -> int:
        """Half-precision scales in a row, and as many for minima behind them; 0 where scales are no codes."""
        kind = self.scale
        return -(-num_columns // SUPER_BLOCK) * (1 + kind.has_minimum) if kind.code_bits else 0

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Stored bytes of a [..., N, K] weight: codes, scales and zero points, ragged blocks included."""
        *leading, num_rows, num_columns = shape
        num_matrices = math.prod(leading)
        block_bytes = self.scale.num_bytes + int(self.asymmetric)
        blocks = self.num_blocks(num_columns) if self.is_packed else 0
        coded = -(-self.num_scale_codes(num_columns) * self.scale.code_bits // 8) + 2 * self.num_supers(num_columns)
        per_row = self.row_bytes(num_columns) + blocks * block_bytes + coded
        return num_matrices * (num_rows * per_row + self.scale.per_matrix_bytes)

    def bits(self, shape: Sequence[int]) -> float:
        """Stored bits per weight, scales and zero points included."""
        return self.num_bytes(shape) * 8 / max(math.prod(shape), 1)


# name: element, block, scale kind, default rule
_ROWS: dict[str, tuple[Element, int, ScaleKind, str]] = {
    "int2": (_INTS[2], 128, BF16_SCALE, "search"),
    "int3": (_INTS[3], 128, BF16_SCALE, "search"),
    "int4": (_INTS[4], 128, BF16_SCALE, "search"),
    "int5": (_INTS[5], 128, BF16_SCALE, "amax"),
    "int6": (_INTS[6], 128, BF16_SCALE, "amax"),
    "int8": (_INTS[8], 128, BF16_SCALE, "amax"),
    "fp4": (_E2M1, 128, BF16_SCALE, "amax"),
    "fp6_e2m3": (_E2M3, 128, BF16_SCALE, "amax"),
    "fp6_e3m2": (_E3M2, 128, BF16_SCALE, "amax"),
    "fp8_e4m3": (_E4M3, 128, BF16_SCALE, "amax"),
    "fp8_e5m2": (_E5M2, 128, BF16_SCALE, "amax"),
    "mxfp4": (_E2M1, 32, E8M0, "floor"),
    "mxfp6_e2m3": (_E2M3, 32, E8M0, "floor"),
    "mxfp6_e3m2": (_E3M2, 32, E8M0, "floor"),
    "mxfp8_e4m3": (_E4M3, 32, E8M0, "floor"),
    "mxfp8_e5m2": (_E5M2, 32, E8M0, "floor"),
    "nvfp4": (_E2M1, 16, NVFP4_SCALE, "amax"),
    "q2_k": (_INTS[2], 16, _K4M, "search"),
    "q3_k": (_INTS[3], 16, _K6, "search"),
    "q4_k": (_INTS[4], 32, _K6M, "search"),
    "q5_k": (_INTS[5], 32, _K6M, "search"),
    "q6_k": (_INTS[6], 16, _K8, "search"),
    "bf16": (_BF16, 1, NO_SCALE, "none"),
}
ALIASES = {"mxfp6": "mxfp6_e2m3", "mxfp8": "mxfp8_e4m3", "fp6": "fp6_e2m3", "fp8": "fp8_e4m3"}
GROUPS = (32, 64, 128)
_MX_SET, _INT_SET = ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"), ("int3_g64", "int4_g64", "int6_g64", "int8_g64")
# names for several formats at once; `k` is for llama.cpp, `groups` has many sizes for what fuses matrices
SETS = {
    "mx": _MX_SET,
    "int": _INT_SET,
    "all": (*_MX_SET, *_INT_SET, "nvfp4"),
    "k": ("q3_k", "q4_k", "q5_k", "q6_k"),
    "groups": (
        *("int2_g64", "int2_g32"),
        *(f"int{bits}{group}" for bits in (3, 4, 5, 6) for group in ("", "_g64", "_g32")),
        "int8",
    ),
}
_NAME = re.compile(r"(?P<base>[a-z0-9_]+?)(?:_g(?P<group>\d+)|(?P<row>_row))?(?P<asym>_asym)?(?:@(?P<rule>\w+))?")


def names() -> list[str]:
    """The table's names, aliases excluded, in order."""
    return list(_ROWS)


def expand(formats: Sequence[str]) -> tuple[str, ...]:
    """Names of formats with those of sets (`mx`, `int`, `all`) replaced by what they hold, each once."""
    return tuple(dict.fromkeys(name for given in formats for name in SETS.get(given, (given,))))


def parse(name: "str | Format", *, scale_rule: str | None = None) -> Format:
    """The format that `name` means; `scale_rule` overrides the name's @RULE. InputError if there is none."""
    if isinstance(name, Format):
        return name if scale_rule is None else parse(name.name, scale_rule=scale_rule)
    if not isinstance(name, str):
        raise InputError(f"a format is named by text such as 'mxfp4', not by {name!r}")
    return _parse(name, scale_rule)


@lru_cache(maxsize=512)
def _parse(name: str, scale_rule: str | None) -> Format:
    match = _NAME.fullmatch(name.strip().lower())
    base = ALIASES.get(match["base"], match["base"]) if match else ""
    if match is None or base not in _ROWS:
        known = nearest(name.partition("@")[0], [*_ROWS, *ALIASES])
        raise InputError(f"unknown format {name!r}{known} (known: {', '.join([*_ROWS, *ALIASES])})")
    element, block, scale, default_rule = _ROWS[base]
    rule = scale_rule or match["rule"] or default_rule
    row = Format(base, element, block, scale, rule, asymmetric=bool(match["asym"]))
    problems = _problems(row, name, match["group"], bool(match["row"]))
    if problems:
        raise InputError(*problems)
    if match["row"]:
        row = replace(row, block=None)
    elif match["group"]:
        row = replace(row, block=int(match["group"]))
    return replace(row, name=_canonical(row, base))


def _problems(row: Format, name: str, group: str | None, whole_row: bool) -> list[str]:
    """Why the parts of a name do not go together, a sentence each."""
    problems = []
    real_scale = row.scale is BF16_SCALE
    if row.rule not in row.scale.rules:
        known = ", ".join(row.scale.rules)
        hint = nearest(row.rule, row.scale.rules)
        problems.append(f"format {name!r}: no scale rule {row.rule!r}{hint} (it has: {known})")
    if real_scale and group and int(group) not in GROUPS:
        problems.append(f"format {name!r}: the group must be one of {', '.join(map(str, GROUPS))} or '_row'")
    if not real_scale and (whole_row or (group and int(group) != row.block)):
        problems.append(f"format {name!r}: the block of {row.name} is fixed at {row.block}")
    if row.asymmetric and (row.element.is_float or not real_scale):
        problems.append(f"format {name!r}: only integer formats can be asymmetric")
    return problems


def _canonical(row: Format, base: str) -> str:
    """The shortest name that parses to `row`: defaults are left out."""
    _, block, _, rule = _ROWS[base]
    group = "" if row.block == block else "_row" if row.block is None else f"_g{row.block}"
    return f"{base}{group}{'_asym' if row.asymmetric else ''}{'' if row.rule == rule else '@' + row.rule}"


def describe() -> list[dict[str, str]]:
    """Rows for `aqtx ls formats`; bits are of a 2048 x 2048 weight."""
    rows = []
    for name in names():
        fmt = parse(name)
        rows.append(
            {
                "format": name,
                "element": fmt.element.name,
                "block": str(fmt.block) if fmt.is_packed else "-",
                "scale": fmt.scale.name,
                "rule": fmt.rule if fmt.is_packed else "-",
                "rules": ", ".join(fmt.scale.rules) if fmt.is_packed else "-",
                "bits": f"{fmt.bits((2048, 2048)):g}",
                "aliases": ", ".join(alias for alias, target in ALIASES.items() if target == name),
            }
        )
    return rows
