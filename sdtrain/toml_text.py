"""Write plain values as TOML, for the resolved recipe of a run folder.

The standard library reads TOML and does not write it; a recipe needs only this much of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any


def toml_text(data: Mapping[str, Any]) -> str:
    """TOML that `tomllib` reads back as `data`; keys whose value is None are left out.

    Raises:
        TypeError: a value that TOML cannot hold.
    """
    return "\n".join(_table(data, ())).strip() + "\n"


def toml_line(data: Mapping[str, Any]) -> str:
    """The pairs of `data` in one line, tables inline; keys whose value is None are left out."""
    return ", ".join(f"{_key(k)} = {_value(v)}" for k, v in data.items() if v is not None)


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """One `[table]`: its plain keys first, then the tables inside it."""
    plain = {k: v for k, v in data.items() if v is not None and not isinstance(v, Mapping)}
    inner = {k: v for k, v in data.items() if isinstance(v, Mapping)}
    lines = [f"\n[{'.'.join(map(_key, path))}]"] if path else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in inner.items():
        lines += _table(value, (*path, key))
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but TOML also wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return f"{{ {toml_line(value)} }}" if value else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"TOML cannot hold {type(value).__name__}: {value!r}")
