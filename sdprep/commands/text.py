"""Reports in words, for people; scripts read the same reports with `--json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sdprep.console import megabytes

Report = dict[str, Any]


def grid(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under a header: numbers to the right, the rest to the left."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    is_number = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        placed = [
            value.rjust(width) if number else value.ljust(width)
            for value, width, number in zip(values, widths, is_number, strict=True)
        ]
        return "  ".join(placed).rstrip()

    return "\n".join(line(values) for values in [list(header), *cells])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value is None


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def counted(counts: Report, separator: str = ", ") -> str:
    """`name 12, other 3`."""
    return separator.join(f"{name} {_cell(count)}" for name, count in counts.items())


def ingest_text(report: Report) -> str:
    """What came in, and what did not and why."""
    lines = [
        counted({key: report[key] for key in ("found", "added", "already_present", "rejected")})
        + f", other files {report['ignored']:,}"
    ]
    lines += [f"  {entry['source_key']}: {entry['reason']}" for entry in report["rejects"][:20]]
    if len(report["rejects"]) > 20:
        lines.append(f"  … and {len(report['rejects']) - 20:,} more; --json lists all")
    return "\n".join(lines)


def annotators_text(reports: list[Report]) -> str:
    """A line for each column."""
    keys = ("column", "done", "skipped", "failed", "images_per_second")
    text = grid(
        [key.replace("_per_", "/") for key in keys], [[r[k] for k in keys] for r in reports]
    )
    errors = [f"  {r['column']}: {r['first_error']}" for r in reports if r.get("first_error")]
    return "\n".join([text, *errors])


def tags_text(report: Report) -> str:
    """What composing did."""
    always = ("added", "aliased", "implied", "blacklisted")
    return "tags: " + counted({key: n for key, n in report.items() if n or key in always})


def dedup_text(report: Report) -> str:
    """Groups by level."""
    counts = {key: value for key, value in report.items() if _is_number(value)}
    return "duplicates: " + counted({key.replace("_", " "): n for key, n in counts.items() if n})


def split_text(report: Report) -> str:
    """Sizes of both sides."""
    return f"split: {counted({key: report[key] for key in ('train', 'validation', 'groups')})}"


def verify_text(report: Report) -> str:
    """What was checked, and what does not hold."""
    problems = report["problems"]
    if problems:
        return "\n".join([f"split does not hold: {len(problems)} problems", *map(str, problems)])
    return "split holds: " + counted({k: v for k, v in report.items() if _is_number(v)})


def publish_text(report: Report) -> str:
    """Where it is, and how to open it."""
    lines = [
        f"published {report['train']:,} train and {report['validation']:,} validation images",
        f"  datasets.load_dataset({report['path']!r})",
    ]
    if report["repo"]:
        lines += [
            f"  datasets.load_dataset({report['repo']!r})  {report['url']}",
            f"sent {report['uploaded']:,} files, {megabytes(report['num_bytes_sent'])}; "
            f"{report['already_there']:,} were there, {report['deleted']:,} deleted",
        ]
    return "\n".join(lines)


def publish_preview_text(found: Report) -> str:
    """What publishing would write and send."""
    size = megabytes(found["num_bytes"])
    lines = [f"would write {found['images']:,} images, {size}, to {found['path']}"]
    push = found["push"]
    if push is None:
        if found["repo"]:
            lines.append(f"would send that to {found['repo']}; once it is there, files are listed")
        return "\n".join(lines)
    state = "private" if push["private"] else "public"
    lines += [
        f"of the folder as it is now, to {push['repo']} "
        f"({state}{'' if push['exists'] else ', which would be made'}):",
        f"would send {len(push['send']):,} files, {megabytes(push['num_bytes'])}; "
        f"{push['already_there']:,} are there",
    ]
    lines += [f"  send    {megabytes(f['num_bytes']):>10}  {f['path']}" for f in push["send"]]
    lines += [f"  delete  {'':>10}  {path}" for path in push["delete"]]
    return "\n".join(lines)


def export_text(report: Report) -> str:
    """Where it is, and how much of it."""
    lines = [
        f"exported {report['train']:,} train and {report['validation']:,} validation images "
        f"as {report['format']}",
        f"  {report['path']}",
    ]
    if report["left_out"]:
        lines.append(f"left out: {counted(report['left_out'])}")
    return "\n".join(lines)


def lint_text(report: Report) -> str:
    """Problems by kind, with examples."""
    lines = [
        f"{report['file']}: {report['format']}, {report['rows']:,} rows, "
        f"{report['rows_with_links']:,} with links; {report['usable']:,} links can be used"
    ]
    for kind, count in report["counts"].items():
        if count:
            examples = [p for p in report["problems"] if p["kind"] == kind][:3]
            lines.append(f"{kind}: {count:,}  ({examples[0]['detail']})")
            lines += [
                f"  line {p['line']}: {p['antecedent']} → {', '.join(p['consequents'])}"
                for p in examples
            ]
    return "\n".join(lines)


_STAGE_TEXT = {
    "ingest": ingest_text,
    "annotate": lambda report: annotators_text(report["annotators"]),
    "tags": tags_text,
    "dedup": dedup_text,
    "select": lambda report: f"select: {counted(report)}",
    "split": split_text,
    "publish": publish_text,
}


def stage_text(name: str, report: Report) -> str:
    """One stage of a recipe."""
    return _STAGE_TEXT[name](report)


def plan_text(steps: Sequence[tuple[str, Report]]) -> str:
    """What a run would do."""
    lines = [f"{name:<9} {json.dumps(report, ensure_ascii=False)}" for name, report in steps]
    return "\n".join(["would run, in this order:", *lines])


def status_text(found: Report) -> str:
    """Where a table stands."""
    lines = [
        f"{found['table']}  version {found['version']}: {found['images']:,} images, "
        f"{found['kept']:,} kept"
    ]
    if found["annotators"]:
        keys = ("column", "done", "open", "failed", "fingerprint")
        rows = [[row[key] for key in keys] for row in found["annotators"]]
        lines.append(grid(["column", "done", "left", "failed", "made by"], rows))
    for stage, reasons in found["rejected"].items():
        lines.append(f"rejected by {stage}: {counted(reasons)}")
    for title in ("splits", "warnings"):
        if found[title]:
            lines.append(f"{title}: {counted(found[title])}")
    if found["captions"]:
        lines += _captions_text(found["captions"])
    return "\n".join(lines)


def _captions_text(found: Report) -> list[str]:
    """What the monitors say of the captions."""
    flags = f" ({counted(found['flags'])})" if found["flags"] else ""
    lines = [f"captions: {found['captioned']:,} images, {found['flagged']:,} flagged{flags}"]
    if found["uncompared"]:
        lines.append(
            f"  {found['uncompared']:,} images have captions that were not compared with them; "
            "run the scorer again with --retry-failed"
        )
    for source, numbers in found["sets"].items():
        lines += [f"  {source}: {warning}" for warning in numbers["warnings"]]
        for scorer, cosine in numbers.get("similarity", {}).items():
            lines.append(f"  {source}: median similarity {cosine:.3f} by {scorer}")
    return lines


def flagged_text(found: Report) -> str:
    """Flagged captions, worst first, with what speaks against them."""
    total, shown = found["flagged"], len(found["rows"])
    if not total:
        return f"none of {found['captioned']:,} captioned images is flagged"
    blocks = [f"{total:,} of {found['captioned']:,} captioned images are flagged; worst first"]
    for row in found["rows"]:
        lines = [f"{row['id']}  {row['file']}  {', '.join(row['flags'])}"]
        lines += [f"  ! {reason}" for reason in row["reasons"]]
        lines += [f"  {each['source']}: {each['text']}" for each in row["captions"]]
        blocks.append("\n".join(lines))
    if shown < total:
        blocks.append(f"… and {total - shown:,} more; --count shows them")
    return "\n\n".join(blocks)


def history_text(stages: list[Report]) -> str:
    """Finished stages, a line each."""
    if not stages:
        return "nothing has been done yet"
    rows = [
        [s["finished"].replace("+00:00", "Z"), s["name"], ", ".join(s["columns"]), s["command"]]
        for s in stages
    ]
    return grid(["finished", "stage", "columns", "command"], rows)


def row_text(row: Report) -> str:
    """Everything that is known about one image; what is not known is left out."""
    lines = []
    for name, value in row.items():
        if value is None or value == []:
            continue
        if not isinstance(value, str | int | float):
            value = json.dumps(_known(value), ensure_ascii=False, default=str)
        lines.append(f"{name:<18} {value}")
    return "\n".join(lines)


def _known(value: Any) -> Any:
    """A value without what is missing in it; bytes as hex, cut short."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"{len(value)} bytes"
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items() if inner is not None}
    return [_known(inner) for inner in value] if isinstance(value, list) else value
