"""The stages, one function each: what a command runs alone, and a recipe in order.

Every stage does only what is missing, so one that was killed goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdprep import plugins
from sdprep.annotate import Annotator, annotate
from sdprep.console import command_line, say, warn
from sdprep.errors import UserError
from sdprep.history import stage
from sdprep.recipe import AnnotatorConfig, column_name, options, validate
from sdprep.schema import COLUMN_PREFIX
from sdprep.table import PhotoTable

Report = dict[str, Any]


# --- one stage each -------------------------------------------------------------------------------


def ingest_stage(table: PhotoTable, source: Any, **how: Any) -> Report:
    """Add the images of one source, and the text beside them."""
    from sdprep.ingest import ingest

    with stage(table, "ingest", command_line()):
        return ingest(table, source, **how).to_json()


def source_from(place: str, type_: str, settings: list[str], given: Report) -> Any:
    """The source that a path stands for; `given` holds options that have a flag of their own.

    Raises:
        UserError: no such kind, option or folder.
    """
    looked = "webdataset" if place.lower().endswith(".tar") else "folder"
    name = looked if type_ == "auto" else type_
    given = {**given, "type": name, "path": place}
    config: Any = options(plugins.config_for("source", name), settings, **given)
    return config.build()


def preview_source(source: Any) -> Report:
    """What a source holds, without reading a picture."""
    items = sum(1 for _ in source.iter_samples())
    totals = source.totals()
    levels = [finding.level for finding in source.findings]
    return {
        "found": items,
        "num_bytes": totals[1] if totals else None,
        "ignored": levels.count("ignored") + levels.count("skipped"),
        "findings": [asdict(finding) for finding in source.findings],
    }


def annotate_stage(
    table: PhotoTable, jobs: Iterable[tuple[str, str, Any]], **how: Any
) -> list[Report]:
    """Run some annotators, (kind, column, config) each, over one shared decode."""
    jobs = list(jobs)
    annotators: dict[str, Annotator] = {column: config.build() for _, column, config in jobs}
    if not annotators:
        return []
    kinds = "+".join(dict.fromkeys(COLUMN_PREFIX[kind] for kind, _, _ in jobs))
    with stage(table, kinds, command_line()):
        reports = [
            report for part in _in_turn(annotators) for report in annotate(table, part, **how)
        ]
        if any(
            a.pixels.reads("caption_") or c.startswith("caption_") for c, a in annotators.items()
        ):
            watch_captions(table)
    return [asdict(report) for report in reports]


def _in_turn(annotators: dict[str, Annotator]) -> list[dict[str, Annotator]]:
    """Those that read what others of them fill come after these, in a pass of their own."""
    later = {
        column: annotator
        for column, annotator in annotators.items()
        if any(annotator.pixels.reads(other) for other in annotators if other != column)
    }
    first = {column: each for column, each in annotators.items() if column not in later}
    return [part for part in (first, later) if part]


def watch_captions(table: PhotoTable) -> Report | None:
    """Run the monitors over every caption there is; says aloud how many they flag."""
    from sdprep.caption_check import check_captions, has_captions

    if not has_captions(table):
        return None
    report = check_captions(table)
    if report["flagged"]:
        say(
            f"{report['flagged']:,} of {report['captioned']:,} captioned images are flagged; "
            f"sdprep show {table.path} --flagged lists them, worst first"
        )
    for source, found in report["sets"].items():
        for warning in found["warnings"]:
            warn(f"captions of {source}: {warning}")
    return report


def compose_stage(table: PhotoTable, config: Any) -> Report:
    """Compose the final tags and captions of every image."""
    from sdprep.tags import TagsConfig, compose_tags

    with stage(table, "tags", command_line()):
        report = compose_tags(table, config or TagsConfig())
        watch_captions(table)
        return report


def duplicates_stage(table: PhotoTable, config: Any) -> Report:
    """Find exact and near duplicates, and name the groups."""
    from sdprep.duplicates import find_duplicates

    with stage(table, "dedup", command_line()):
        return find_duplicates(table, config).to_json()


def select_stage(table: PhotoTable, config: Any, *, reset: bool = False) -> Report:
    """Reject what does not match a predicate."""
    from sdprep.select import select_table

    with stage(table, "select", command_line()):
        where = config.where if config else None
        reason = config.reason if config else None
        return asdict(select_table(table, where, reason, reset=reset))


def split_stage(table: PhotoTable, config: Any, *, redo: bool = False) -> Report:
    """Assign train and validation by group."""
    from sdprep.split import split_table

    with stage(table, "split", command_line()):
        return split_table(table, config, redo=redo).to_json()


def publish_stage(table: PhotoTable, config: Any, policy: Any, recipe_text: str = "") -> Report:
    """Write the prepared data set, and send it to the Hub if `push` is given."""
    from sdprep.hub_access import open_hub
    from sdprep.prompt_rows import spellings
    from sdprep.publish import publish
    from sdprep.push import push

    api = open_hub(config.push) if config.push else None  # before hours of writing
    config = _placed(table, config)
    done = publish(
        table, config=config, policy=policy, spellings=spellings(table), recipe_text=recipe_text
    )
    if api is None:
        return done.to_json()
    sent = push(done.path, config.push, private=config.private, api=api)
    return done.to_json() | sent.to_json()


def publish_preview(table: PhotoTable, config: Any) -> Report:
    """What publishing would do; nothing is written or sent.

    Which files a push would send is known of a folder that is there: of it as it is now.
    """
    import pyarrow.compute as pc

    from sdprep.hub_access import open_hub
    from sdprep.publish import MISSING_TO
    from sdprep.push import push_preview
    from sdprep.schema import MANIFEST

    config = _placed(table, config)
    if config.to is None:
        raise UserError("publish.to is missing", MISSING_TO)
    sizes = table.kept(["num_bytes"])["num_bytes"]
    found: Report = {"dry_run": True, "path": str(config.to), "repo": config.push}
    found |= {"images": len(sizes), "num_bytes": pc.sum(sizes).as_py() or 0, "push": None}
    if config.push and (config.to / MANIFEST).is_file():
        found["push"] = push_preview(config.to, config.push, private=config.private)
    elif config.push:
        open_hub(config.push)
    return found


def _placed(table: PhotoTable, config: Any) -> Any:
    """With a name on the Hub alone, the folder lies beside the table; the card has that name."""
    if config.push is None:
        return config
    beside = table.path.parent / f"{table.path.stem}-prepared"
    title = config.title or config.push.rpartition("/")[2]
    return config.model_copy(update={"to": config.to or beside, "title": title})


# --- options from the command line ---------------------------------------------------------------


def configs_from_options(
    kind: str, names: list[str], settings: list[str], as_name: str | None
) -> list[tuple[str, str, AnnotatorConfig]]:
    """(kind, column, config) for `--with NAME …` and `--set key=value …`.

    With several names a setting says whose it is: `--set technical.key=value`.

    Raises:
        UserError: an unknown plugin, key or value; `--as` with several plugins.
    """
    if as_name and len(names) > 1:
        raise UserError("--as names one column, and several plugins were given")
    jobs = []
    for name in names:
        own = [setting for setting in settings if _is_for(setting, name, names)]
        given = {"type": name} | ({"as": as_name} if as_name else {})
        own = [setting.removeprefix(f"{name}.") for setting in own]
        config = options(plugins.config_for(kind, name), own, **given)
        jobs.append((kind, column_name(kind, config), config))  # type: ignore[arg-type]
    return jobs  # type: ignore[return-value]


def _is_for(setting: str, name: str, names: list[str]) -> bool:
    first = setting.split("=")[0].split(".")[0]
    if first in names:
        return first == name
    if len(names) > 1:
        raise UserError(
            f"--set {setting}: several plugins were given",
            f"Say whose option it is, such as --set {name}.{setting}",
        )
    return True


def tags_config(
    table: PhotoTable, aliases: Path | None, implications: Path | None, blacklist: Path | None
) -> Any:
    """What composes the tags: the lists given, else those of the last time."""
    from sdprep.tags import TagsConfig

    given: Report = json.loads(table.notes("tags").get("tags_config", "{}"))
    given |= {"aliases": str(aliases)} if aliases else {}
    given |= {"implications": str(implications)} if implications else {}
    given |= {"blacklist": str(blacklist)} if blacklist else {}
    return validate(given, TagsConfig, "the command line")
