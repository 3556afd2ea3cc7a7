"""Captions that were asked for as JSON: what they say, or that they are broken."""

from __future__ import annotations

import json
import re
from typing import Any

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


def asks_for_json(prompt: str | None) -> bool:
    """Whether the prompt wants JSON."""
    return bool(re.search(r"\bjson\b", prompt or "", re.IGNORECASE))


def words_in_json(text: str) -> str | None:
    """All text values of an answer in JSON, a line each, fenced or not; None: it is no JSON."""
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return "\n".join(_texts_in(value)) if isinstance(value, dict | list) else None


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [text for each in inner for text in _texts_in(each)]
    return [value] if isinstance(value, str) else []
