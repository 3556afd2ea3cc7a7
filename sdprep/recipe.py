"""Recipes: TOML read into one frozen, strict model, with every mistake reported at once."""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdprep.errors import RecipeError, nearest
from sdprep.schema import COLUMN_PREFIX


class Section(BaseModel):
    """One table of a recipe: unknown keys are errors, values are never coerced, nothing mutates."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class AnnotatorConfig(Section):
    """What every scorer, tagger, detector and captioner takes besides its own options."""

    as_name: str | None = Field(
        None,
        alias="as",
        pattern=r"^[a-z0-9][a-z0-9_]*$",
        description="Name of the column, when it is not the plugin's own; keeps two runs apart.",
    )


def column_name(kind: str, config: AnnotatorConfig) -> str:
    """The struct column that an annotator of a kind fills, such as `score_technical`."""
    return f"{COLUMN_PREFIX[kind]}_{config.as_name or config.type}"  # type: ignore[attr-defined]


Recipe = TypeVar("Recipe", bound=Section)


def load_recipe(path: str | Path, model: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the TOML file.
        model: the root section.
        overrides: `key.path=value` from `--set`; the value is TOML, or a plain string. Without a
            value, as in `train.samples=`, the key is taken out.

    Raises:
        RecipeError: every mistake, each with file, key path, value found and nearest valid key.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"there is no recipe {path}", "Shipped ones are in the folder recipes/.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe error in {path}\n  not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(data, override, takes_out=True)
    return validate(data, model, str(path))


def validate(data: dict[str, Any], model: type[Recipe], where: str) -> Recipe:
    """Check `data` (as TOML gives it) against `model`; `where` names it in errors."""
    data = _with_default_types(data, model)
    try:
        # JSON mode, so that strictness still lets an array become a tuple and a string a path.
        return model.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise RecipeError(_explain(error, data, model, where)) from None


def _with_default_types(data: dict[str, Any], model: type[Section]) -> dict[str, Any]:
    """Give a table that names no plugin the `type` of the one that the recipe would take."""
    filled = dict(data)
    for name, field in model.model_fields.items():
        key = field.alias or name
        table = filled.get(key)
        if not isinstance(table, dict) or "type" in table or field.is_required():
            continue
        default = getattr(field.get_default(call_default_factory=True), "type", None)
        if default is not None and len(list(_sections(field.annotation))) > 1:
            filled[key] = {"type": default, **table}
    return filled


def options(model: type[Recipe], settings: Sequence[str], **given: Any) -> Recipe:
    """Build one section from command-line `key=value` settings, checked as a recipe would be."""
    data: dict[str, Any] = dict(given)
    for setting in settings:
        _apply_override(data, setting)
    return validate(data, model, "the command line (--set)")


def _apply_override(data: dict[str, Any], override: str, *, takes_out: bool = False) -> None:
    """Put one `key.path=value` into `data`; with `takes_out` a key without a value goes away."""
    key_path, equals, text = override.partition("=")
    keys = key_path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: expected key=value, such as split.validation=0.1")
    is_out = takes_out and not text.strip()
    place: Any = data
    for position, key in enumerate(keys[:-1]):
        if isinstance(place, list):
            place = place[_index(place, key, override)]
        elif is_out:
            place = place[_there(place, key, override)]
        else:
            place = place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {override}: {'.'.join(keys[: position + 1])} is no table")
    last = _index(place, keys[-1], override) if isinstance(place, list) else keys[-1]
    if is_out:
        del place[last if isinstance(place, list) else _there(place, keys[-1], override)]
    else:
        place[last] = _value(text)


def _value(text: str) -> Any:
    """A value as TOML, or else a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _there(place: dict[str, Any], key: str, override: str) -> str:
    """A key that the recipe has."""
    if key in place:
        return key
    near = nearest(key, list(place))
    raise RecipeError(
        f"--set {override}: without a value it takes a key out, and the recipe has no {key} there",
        f"Did you mean {near}?" if near else f"There are: {', '.join(place) or 'none'}.",
    )


def _index(place: list[Any], key: str, override: str) -> int:
    """One entry of an array of tables: by index, or by its plugin's `type` or `as` name."""
    if key.isdigit() and int(key) < len(place):
        return int(key)
    named = [at for at, x in enumerate(place) if isinstance(x, dict) and key in _names(x)]
    if len(named) == 1:
        return named[0]
    raise RecipeError(
        f"--set {override}: {key!r} is none of the {len(place)} entries",
        f"Use a number from 0 to {len(place) - 1}, or a type that occurs once.",
    )


def _names(entry: dict[str, Any]) -> tuple[Any, Any]:
    return entry.get("as"), entry.get("type")


def _explain(error: ValidationError, data: dict[str, Any], model: type[Section], where: str) -> str:
    rows = []
    for problem in error.errors(include_url=False):
        path, value, section = _locate(problem["loc"], data, model)
        if problem["type"] == "union_tag_invalid":
            # pydantic quotes the discriminating key: 'type', or 'family' in a training recipe.
            path = f"{path}.{problem['ctx']['discriminator'].strip(chr(39))}"
            value = problem["ctx"]["tag"]
        # A check of the whole recipe has no key of its own, and its value is everything.
        left = path + _shown(value) if path else ""
        rows.append((left, _reason(problem, path, section, model)))
    width = max(len(left) for left, _ in rows)
    lines = [f"  {left:<{width}}  {reason}" if left else f"  {reason}" for left, reason in rows]
    return "\n".join([f"recipe error in {where}", *lines])


_MISSING = object()
TAG_KEYS = ("type", "family")
"""Keys by which the members of a union of sections are told apart."""


def _tags(value: dict[str, Any]) -> list[Any]:
    return [value[key] for key in TAG_KEYS if key in value]


def _locate(
    loc: tuple[int | str, ...], data: Any, model: type[Section]
) -> tuple[str, Any, type[Section] | None]:
    """Walk a pydantic location through the raw data; drop the union tags it contains.

    Returns:
        dotted key path, the raw value there, and the section that should own the last key.
    """
    path, value = "", data
    annotation: Any = model
    owner: type[Section] | None = model
    for index, key in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(value, dict) and key not in value and key in _tags(value):
            continue  # pydantic's union tag, not a key of the file
        owner = _section_in(annotation, value)
        if isinstance(key, int):
            path += f"[{key}]"
            annotation = next(iter(get_args(_unwrapped(annotation))), Any)
            value = value[key] if isinstance(value, list) and key < len(value) else _MISSING
        else:
            path += f".{key}" if path else key
            annotation = _field_annotation(owner, key)
            value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING and not is_last:
            break
    return path, value, owner


def _unwrapped(annotation: Any) -> Any:
    """An optional annotation without its None."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return members[0]
    return annotation


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _sections(argument)


def _section_in(annotation: Any, value: Any) -> type[Section] | None:
    found = list(_sections(annotation))
    if len(found) > 1 and isinstance(value, dict):
        for section in found:
            for tag in TAG_KEYS:
                field = section.model_fields.get(tag)
                if field is not None and value.get(tag) in get_args(field.annotation):
                    return section
    return found[0] if len(found) == 1 else None


def _keys(section: type[Section]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in section.model_fields.items()}


def _field_annotation(section: type[Section] | None, key: str) -> Any:
    return _keys(section).get(key, Any) if section else Any


def _shown(value: Any) -> str:
    if value is _MISSING:
        return ""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f" = {text if len(text) <= 60 else text[:57] + '...'}"


def _reason(problem: Any, path: str, section: type[Section] | None, model: type[Section]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, section, model)
    if kind == "missing":
        return "missing; it has no default"
    if kind in ("literal_error", "union_tag_invalid"):
        return _unknown_choice(problem, context)
    if kind == "union_tag_not_found":
        return f"needs a key {context['discriminator'].strip(chr(39))} that names the plugin"
    bounds = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge")}
    bounds |= {"less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}
    if kind in bounds:
        sign, key = bounds[kind]
        return f"must be {sign} {context[key]}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return _no_table(problem, path, section)
    if kind == "value_error":
        return str(context["error"])
    message = problem["msg"]
    return message[0].lower() + message[1:]


def _no_table(problem: Any, path: str, section: type[Section] | None) -> str:
    """What to write where a table belongs; a plugin's name alone is a key of that table."""
    word, key = problem.get("input"), path.rpartition(".")[2]
    members = [each.model_fields for each in _sections(_field_annotation(section, key))]
    tags = [tag for tag in reversed(TAG_KEYS) if all(tag in fields for fields in members)]
    is_choice = tags and any(word in get_args(fields[tags[0]].annotation) for fields in members)
    hint = f", such as {path}.{tags[0]} = {json.dumps(word)}" if is_choice else ""
    return f"must be a table, with keys of its own{hint}"


def _unknown_key(path: str, section: type[Section] | None, model: type[Section]) -> str:
    parent, _, key = path.rpartition(".")
    near = nearest(key, list(_keys(section))) if section else None
    if near:
        return f"unknown key; did you mean {parent + '.' if parent else ''}{near}?"
    elsewhere = [place for place in _all_keys(model) if place.rpartition(".")[2] == key]
    if path in elsewhere and section and "type" in section.model_fields:
        tag = section.model_fields["type"].default
        return f"{parent}.type = {tag} has no such key, though another type has"
    if elsewhere:
        return f"unknown key here; there is {elsewhere[0]}"
    allowed = ", ".join(_keys(section)) if section else ""
    return f"unknown key; allowed here: {allowed}" if allowed else "unknown key"


def _all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for key, annotation in _keys(section).items():
        yield prefix + key
        for inner in _sections(annotation):
            yield from _all_keys(inner, f"{prefix}{key}.")


def _unknown_choice(problem: Any, context: dict[str, Any]) -> str:
    import re

    expected = str(context.get("expected") or context.get("expected_tags") or "")
    choices = re.findall(r"'([^']*)'", expected)
    found = context.get("tag", problem.get("input"))
    near = nearest(str(found), choices)
    suggestion = f"did you mean {near}? " if near else ""
    return f"no such choice; {suggestion}There are: {', '.join(choices)}."
