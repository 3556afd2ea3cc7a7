"""Provenance and differences of models, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdtrain.provenance import Provenance
from sdtrain.toml_text import toml_text

_INDENT = "  "


def provenance_text(of: Provenance) -> str:
    """Everything that is known of a model, for people."""
    record = of.record
    lines = [f"{of.kind} {of.path}"]
    if not record:
        return "\n".join([*lines, "it holds no record of its training", *_about(of.about)])
    if "samples_seen" in record:
        lines.append(f"trained on {record['samples_seen']:,} samples")
    lines += _about(of.about)
    data = record.get("data") or {}
    if data:
        lines += ["", "data"]
        known = {key: value for key, value in data.items() if not isinstance(value, Mapping)}
        lines += [f"{_INDENT}{key} {value}" for key, value in known.items() if value is not None]
    if record.get("freeze_table"):
        lines += ["", "what was trained"]
        lines += [_INDENT + line for line in str(record["freeze_table"]).splitlines()]
    if record.get("evaluations"):
        lines += ["", "evaluations", *_evaluations(record["evaluations"])]
    if record.get("versions"):
        known = {name: found for name, found in record["versions"].items() if found}
        lines += ["", "versions", _INDENT + ", ".join(f"{n} {v}" for n, v in known.items())]
    if record.get("recipe"):
        lines += ["", "recipe"]
        lines += [(_INDENT + line).rstrip() for line in toml_text(record["recipe"]).splitlines()]
    return "\n".join(lines)


def _about(about: Mapping[str, str]) -> list[str]:
    shown = ("title", "architecture", "author", "description", "date", "hash_sha256")
    return [f"{key} {about[key]}" for key in shown if key in about]


def _evaluations(lines: list[Mapping[str, Any]]) -> list[str]:
    """First and last line of each set, with the change since sample 0."""
    by_set: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_set.setdefault(str(line.get("set")), []).append(line)
    told = []
    for name, found in by_set.items():
        told.append(f"{_INDENT}{name}: {len(found)} times")
        for at in dict.fromkeys((0, len(found) - 1)):
            each = found[at]
            change = each.get("change_percent")
            by = "" if change is None else f", {change:+.3f} % since sample 0"
            told.append(f"{_INDENT * 2}at {each['samples_seen']:,}: {each['mean']:.6f}{by}")
    return told


def difference_text(found: Mapping[str, Any]) -> str:
    """What `provenance.difference` found, for people."""
    lines = [f"A {found['a']}", f"B {found['b']}", ""]
    keys = found["keys"]
    silent = " and ".join(found["without_record"])
    if silent:  # everything that the other one says would be listed
        lines.append(f"{silent} holds no record of its training, so only tensors are compared")
        keys = {}
    width = max((len(key) for key in keys), default=0)
    lines += [
        f"{key:<{width}}  {_short(pair[0])} -> {_short(pair[1])}" for key, pair in keys.items()
    ]
    if not keys and not silent:
        lines.append("recipe, data, versions and length are the same")
    lines += ["", f"{'part':<20} {'same':>6} {'changed':>8} {'only A':>7} {'only B':>7}  moved by"]
    for part in found["parts"]:
        lines.append(
            f"{part['part']:<20} {part['same']:>6,} {part['changed']:>8,} {part['only_a']:>7,} "
            f"{part['only_b']:>7,}  {part['percent']:.4g} %"
        )
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
