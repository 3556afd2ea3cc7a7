"""Names of sources: two folders called `images` are two sources, and a moved one is the same.

`<table>.sources.json` beside the table remembers where each name was last found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from sdprep.console import warn
from sdprep.errors import DataError


def name_for(table: Path, wanted: str, place: str, *, is_chosen: bool = False) -> str:
    """The name under which a source goes into a table; the same place always gets the same one.

    Args:
        table: the `.lance` folder.
        wanted: what the source calls itself.
        place: where it is: an absolute path, or something with `://` in it.
        is_chosen: a person chose the name, so it means the same source wherever it lies.
    Raises:
        DataError: the file that remembers the names is damaged.
    """
    file = table.with_suffix(".sources.json")
    places = _read(file)
    for name, known in places.items():
        if known == place and (not is_chosen or name == wanted):
            return name
    name, number = wanted, 1
    while name in places and not is_chosen and _is_there(places[name]):
        number += 1
        name = f"{wanted}-{number}"
    if name in places:
        warn(f"source {name} was at {places[name]} before, now at {place}: taken as the same one")
    elif number > 1:
        warn(f"another source is called {wanted}; {place} goes in as {name}")
    scratch = file.with_name(file.name + ".tmp")
    scratch.write_text(json.dumps({**places, name: place}, indent=1, ensure_ascii=False), "utf-8")
    os.replace(scratch, file)
    return name


def _is_there(place: str) -> bool:
    return "://" in place or os.path.exists(place)


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(p, str) for p in found.values()):
        raise DataError(
            f"{file} is damaged; it should map source names to places",
            "Remove it: sources are then told apart by their names alone.",
        )
    return found
