"""Parts that a folder scan finds: the file's existence is its registration.

A plugin is a module with `class Config(Section)` that has `type: Literal["<module name>"]` and
`build()`. Other packages add theirs through an entry-point group (`sdprep.plugins` or
`sdtrain.plugins`) under the name `<kind>.<name>`; one that fails to import is named in a warning
and breaks nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from sdprep.console import warn
from sdprep.errors import UserError, nearest

if TYPE_CHECKING:
    from sdprep.recipe import Section

PREP_KINDS = ("source", "scorer", "tagger", "detector", "captioner", "export")
TRAIN_KINDS = ("family", "loss", "weighting", "adapter", "optimizer", "schedule")

_PACKAGES = {
    **{kind: f"sdprep.{kind}s" for kind in PREP_KINDS},
    "family": "sdtrain.families",
    "loss": "sdtrain.losses",
    "weighting": "sdtrain.weightings",
    "adapter": "sdtrain.adapters",
    "optimizer": "sdtrain.optimizers",
    "schedule": "sdtrain.schedules",
}


@lru_cache
def configs(kind: str) -> dict[str, type[Section]]:
    """Every plugin of `kind` by name, sorted: ours and those of other installed packages.

    Raises:
        TypeError: one of our own modules breaks the plugin contract.
    """
    package = importlib.import_module(_PACKAGES[kind])
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            found[module.name] = _config_of(f"{package.__name__}.{module.name}", module.name)
    group = package.__name__.split(".")[0] + ".plugins"
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        entry_kind, _, name = entry.name.partition(".")
        if entry_kind == kind:
            try:
                found[name] = _config_of(entry.value, name)
            except Exception as error:  # someone else's code: any failure is theirs to mend
                warn(f"plugin {entry.name} ({entry.value}) cannot be used: {error}")
    return dict(sorted(found.items()))


def _config_of(module_name: str, name: str) -> type[Section]:
    config = getattr(importlib.import_module(module_name), "Config", None)
    if config is None:
        raise TypeError(f"{module_name} has no class Config")
    field = config.model_fields.get("type")
    if field is None or get_args(field.annotation) != (name,):
        raise TypeError(f'{module_name}.Config.type must be Literal["{name}"]')
    if not callable(getattr(config, "build", None)):
        raise TypeError(f"{module_name}.Config has no build()")
    return config


def config_for(kind: str, name: str) -> type[Section]:
    """The Config class of one plugin.

    Raises:
        UserError: there is no such plugin; names the nearest one and all there are.
    """
    known = configs(kind)
    if name in known:
        return known[name]
    near = nearest(name, list(known))
    suggestion = f"did you mean {near}? " if near else ""
    raise UserError(f"no {kind} is called {name!r}", f"{suggestion}There are: {', '.join(known)}.")


def union(kind: str) -> Any:
    """The type of a recipe table that holds one plugin of `kind`, told apart by its `type` key."""
    from pydantic import Field

    members = tuple(configs(kind).values())
    if not members:
        return _nothing(kind)
    if len(members) == 1:
        return members[0]
    return Annotated[Union[members], Field(discriminator="type")]  # noqa: UP007  built at run time


def _nothing(kind: str) -> Any:
    """Stands for a kind that has no plugin: whatever a recipe asks of it is explained."""
    from pydantic import BeforeValidator

    def refuse(value: Any) -> Any:
        raise ValueError(f"no {kind} is installed")

    return Annotated[dict, BeforeValidator(refuse)]


def describe(kinds: tuple[str, ...]) -> dict[str, Any]:
    """Every plugin of some kinds with what it does and its options, JSON-able."""
    return {
        kind: [_described(name, config) for name, config in configs(kind).items()] for kind in kinds
    }


def _described(name: str, config: type[Section]) -> dict[str, Any]:
    options = [
        {
            "key": field.alias or key,
            "default": None
            if field.is_required()
            else field.get_default(call_default_factory=True),
            "required": field.is_required(),
            "description": field.description or "",
        }
        for key, field in config.model_fields.items()
        if key != "type"
    ]
    summary = (config.__doc__ or "").strip().split("\n")[0]
    return {"name": name, "summary": summary, "module": config.__module__, "options": options}


def describe_text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for kind, plugins in found.items():
        lines.append(f"{kind}s" if plugins else f"{kind}s: none yet")
        for plugin in plugins:
            lines.append(f"  {plugin['name']}: {plugin['summary']}")
            for option in plugin["options"]:
                default = "required" if option["required"] else f"default {option['default']}"
                lines.append(f"    {option['key']} ({default}): {option['description']}")
    return "\n".join(lines)
