"""config.json as transformers writes it: infinity and NaN, which JSON has not, are {"__float__": "Infinity"}."""

import json
import math
from collections.abc import Mapping
from typing import Any

_TAG = "__float__"
_VALUES = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def config_text(config: Mapping[str, Any]) -> str:
    """The text of a config.json that every reader of JSON takes."""
    return json.dumps(_encoded(config), indent=2, allow_nan=False) + "\n"


def decoded(value: Any) -> Any:
    """Content of a config.json with such objects as the numbers that they stand for."""
    if isinstance(value, Mapping):
        if value.keys() == {_TAG} and isinstance(value[_TAG], str) and value[_TAG] in _VALUES:
            return _VALUES[value[_TAG]]
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: next(name for name, number in _VALUES.items() if number == value or math.isnan(number))}
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, (list, tuple)) else value
