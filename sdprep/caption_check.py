"""The fold that watches captions: what is wrong with each, and how each captioner sounds as a set.

Captions that a model wrote are synthetic data: they loop, refuse, break off, and tell of things
that are not there. The column `caption_check` says so for every image that has a caption.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sdprep.caption_claims import Seen, check_claims
from sdprep.caption_drift import describe_set, keyed_sample
from sdprep.caption_monitors import (
    FLAGS,
    Habits,
    check_text,
    ends_with_mark,
    language_of,
    requested_words,
    scripts,
    words_of,
)
from sdprep.caption_rows import SIDECAR, Caption, caption_columns, caption_rows, captions_of
from sdprep.caption_similarity import least_usual
from sdprep.seeding import uniform

if TYPE_CHECKING:
    from sdprep.table import PhotoTable

COLUMN = "caption_check"
CHECK = pa.struct(
    {
        "flags": pa.list_(pa.string()),  # of caption_monitors.FLAGS; empty: nothing is wrong
        "score": pa.float32(),  # contradictions ÷ checks that applied; NULL where none did
        "checks": pa.int32(),  # how many applied
        "reasons": pa.list_(pa.string()),  # `<source>: <flag>: <what was found>`
        # What --retry-failed does again: caption columns with a flag, and score columns that have
        # compared another text than the caption that is there now.
        "columns": pa.list_(pa.string()),
    }
)
REPORT = "caption_report"
BASE_RATE = 0.02  # of the captions without a flag that a reviewer sees too
LEAST_FOR_HABITS = 20


def check_row(
    captions: Sequence[Caption], habits: Mapping[str, Habits], seen: Seen
) -> dict[str, Any]:
    """What is wrong with the captions of one image, as one value of `CHECK`."""
    flags: set[str] = set()
    reasons, columns = [], []
    checks = contradictions = 0
    for caption in captions:
        found = check_text(
            caption.text,
            prompt=caption.prompt,
            finish_reason=caption.finish_reason,
            habits=habits.get(caption.column),
        )
        claims = check_claims(caption.text, seen)
        against = [f"contradiction: {claim.reason}" for claim in claims if claim.reason]
        checks += len(claims)
        contradictions += len(against)
        far = _far_from_picture(caption, habits.get(caption.column))
        own = [f"{flag}: {reason}" for flag, reason in found.items()] + against + far
        flags.update(found, ["contradiction"] if against else [], ["similarity"] if far else [])
        reasons += [f"{caption.source}: {reason}" for reason in own]
        if own and caption.column != SIDECAR:
            columns.append(caption.column)
        for scorer in caption.uncompared:
            reasons.append(f"{caption.source}: not compared by {scorer} since it was written")
            columns += [scorer] if scorer not in columns else []
    return {
        "flags": [flag for flag in FLAGS if flag in flags],
        "score": contradictions / checks if checks else None,
        "checks": checks,
        "reasons": reasons,
        "columns": columns,
    }


def _far_from_picture(caption: Caption, habits: Habits | None) -> list[str]:
    """What each scorer of similarity has against a caption."""
    bounds = habits.cosines if habits else {}
    return [
        f"similarity: {cosine:.3f} by {scorer}, usual here is {bounds[scorer]:.3f} or more"
        for scorer, cosine in caption.cosines.items()
        if scorer in bounds and cosine < bounds[scorer]
    ]


def habits_of(captions: Sequence[Caption]) -> Habits:
    """What is usual among the captions of one column; too few of them tell nothing."""
    if len(captions) < LEAST_FOR_HABITS:
        return Habits()
    texts = [caption.text for caption in captions]
    letters: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for text in texts:
        letters.update(scripts(text))
        languages[language_of(words_of(text)) or ""] += 1
    del languages[""]
    free = [c for c in captions if c.prompt and requested_words(c.prompt) is None]
    return Habits(
        ends_with_mark=sum(map(ends_with_mark, texts)) >= _many(len(texts)) * len(texts),
        script=max(sorted(letters), key=lambda name: letters[name]) if letters else "LATIN",
        language=max(sorted(languages), key=lambda name: languages[name]) if languages else "en",
        words=_usual_words([len(words_of(caption.text)) for caption in free]),
        cosines={
            scorer: least_usual(cosines)
            for scorer, cosines in _by_scorer(captions).items()
            if len(cosines) >= LEAST_FOR_HABITS
        },
    )


def _by_scorer(captions: Sequence[Caption]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for caption in captions:
        for scorer, cosine in caption.cosines.items():
            found.setdefault(scorer, []).append(cosine)
    return found


def _many(count: int) -> float:
    """Share of `count` captions that makes a habit: 0.8, plus what chance may add to 3 of 4.

    Of COCO's captions 75 % end with a mark, which is no habit.
    """
    return min(0.8 + 1 / math.sqrt(count), 1.0)


def _usual_words(counts: Sequence[int]) -> tuple[float, float] | None:
    """Bounds beyond which a number of words is an outlier: five robust standard deviations.

    On the logarithm, and never closer than a factor of four.
    """
    if len(counts) < LEAST_FOR_HABITS:
        return None
    logs = sorted(math.log(max(count, 1)) for count in counts)
    middle = logs[len(logs) // 2]
    deviations = sorted(abs(value - middle) for value in logs)
    reach = max(math.log(4), 5 * 1.4826 * deviations[len(deviations) // 2])
    return math.exp(middle - reach), math.exp(middle + reach)


# --- over a table ---------------------------------------------------------------------------------


def has_captions(table: PhotoTable) -> bool:
    """Whether any image has a caption, so that there is something to watch."""
    if table.has(COLUMN):
        return True
    wanted = [f"{column}.text IS NOT NULL" for column in caption_columns(table)]
    return table.count(" OR ".join([*wanted, "text.caption IS NOT NULL"])) > 0


def check_captions(table: PhotoTable) -> dict[str, Any]:
    """Write `caption_check` for every image that has a caption, in one commit.

    Returns:
        `captioned` (images), `flagged`, `flags` (flag → images), `uncompared` (images whose
        captions a scorer of similarity has not seen as they are) and `sets` (source → numbers of
        `caption_drift.describe_set`, and median `similarity` by scorer), which also stand in the
        notes of the column.
    """
    with table.writer():
        table.refresh()
        by_column: dict[str, list[tuple[str, Caption]]] = {}
        for id_, captions, _ in caption_rows(table, with_seen=False):
            for caption in captions:
                by_column.setdefault(caption.column, []).append((id_, caption))
        habits = {
            column: habits_of([caption for _, caption in found])
            for column, found in by_column.items()
        }
        ids, values = [], []
        for id_, captions, seen in caption_rows(table, with_seen=True):
            if captions:
                ids.append(id_)
                values.append(check_row(captions, habits, seen))
        report = _counted(values) | {"sets": _sets(by_column)}
        notes = {REPORT: json.dumps(report, sort_keys=True, ensure_ascii=False)}
        table.write_fold(ids, {COLUMN: pa.array(values, CHECK)}, stage="caption_check", notes=notes)
    return report


def _counted(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = Counter(flag for value in values for flag in value["flags"])
    return {
        "captioned": len(values),
        "flagged": sum(bool(value["flags"]) for value in values),
        "flags": {flag: counts[flag] for flag in FLAGS if counts[flag]},
        "uncompared": sum(
            any(name.startswith("score_") for name in value["columns"] or []) for value in values
        ),
    }


def _sets(by_column: Mapping[str, Sequence[tuple[str, Caption]]]) -> dict[str, Any]:
    """Numbers of each captioner, with drift against what came beside the images."""
    samples = {
        column: keyed_sample([(id_, caption.text) for id_, caption in found])
        for column, found in by_column.items()
    }
    reference = samples.get(SIDECAR, [])
    reference = reference if len(reference) >= LEAST_FOR_HABITS else []
    sets = {}
    for column, found in by_column.items():
        captions = [caption for _, caption in found]
        numbers = describe_set(samples[column], () if column == SIDECAR else reference)
        numbers["similarity"] = {
            scorer: round(statistics.median(cosines), 4)
            for scorer, cosines in _by_scorer(captions).items()
        }
        sets[captions[0].source] = numbers
    return sets


# --- looking at them ------------------------------------------------------------------------------


def severity(check: Mapping[str, Any]) -> float:
    """How bad one check is: a point for each flag, and up to one for contradictions."""
    plain = sum(flag != "contradiction" for flag in check["flags"] or [])
    return plain + (check["score"] or 0.0)


def review_queue(table: PhotoTable, count: int) -> dict[str, Any]:
    """Flagged captions, worst first, and some without a flag for a base rate.

    Returns:
        `flagged` and `captioned` (images), `rows` of id, file, flags, score, reasons and captions,
        and `base_rate`: ids of a fixed 2 % of the images without a flag.
    """
    if not table.has(COLUMN):
        return {"captioned": 0, "flagged": 0, "rows": [], "base_rate": []}
    checks = table.read(["id", COLUMN], f"{COLUMN} IS NOT NULL").to_pylist()
    flagged = [row for row in checks if row[COLUMN]["flags"]]
    flagged.sort(key=lambda row: (-severity(row[COLUMN]), row["id"]))
    fine = [row["id"] for row in checks if not row[COLUMN]["flags"]]
    shown = {row["id"]: row[COLUMN] for row in flagged[:count]}
    return {
        "captioned": len(checks),
        "flagged": len(flagged),
        "rows": _shown(table, shown),
        "base_rate": [id_ for id_ in fine if uniform("base_rate", id_) < BASE_RATE],
    }


def _shown(table: PhotoTable, checks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not checks:
        return []
    columns = caption_columns(table)
    paths = [f"{column}.{part}" for column, parts in columns.items() for part in parts]
    names = ", ".join(f"'{id_}'" for id_ in checks)
    rows = table.read(["id", "sources", "text.caption", *paths], f"id IN ({names})").to_pylist()
    by_id = {row["id"]: row for row in rows}
    found = []
    for id_, check in checks.items():
        row = by_id[id_]
        file = row["sources"][0]["key"] if row["sources"] else id_
        texts = [{"source": c.source, "text": c.text} for c in captions_of(row, columns)]
        found.append({"id": id_, "file": file, "severity": severity(check), **check})
        found[-1] |= {"captions": texts}
    return found


def caption_counts(table: PhotoTable) -> dict[str, Any] | None:
    """What `sdprep status` says of the captions; None where none were checked."""
    if not table.has(COLUMN):
        return None
    checks = table.read([COLUMN], f"{COLUMN} IS NOT NULL")[COLUMN].to_pylist()
    sets = json.loads(table.notes(COLUMN).get(REPORT, "{}")).get("sets", {})
    return _counted(checks) | {"sets": sets}
