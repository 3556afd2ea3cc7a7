"""Prompts and their statistics, for people and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdprep.commands.text import grid
from sdprep.prompt_policy import PromptPolicy, load_policy
from sdprep.table import PhotoTable
from sdprep.table_policy import policy_of

_BAR = 40


def read_policy(path: Path | None, table: PhotoTable) -> PromptPolicy:
    """A policy file, or what the table keeps of the last recipe, or the defaults."""
    return load_policy(path) if path else policy_of(table) or PromptPolicy()


def preview(
    table: PhotoTable, files: list[Path | None], count: int, visit: int, seed: int
) -> tuple[dict[str, Any], str]:
    """The exact texts of the first images, under one policy or two."""
    from sdprep.prompt_rows import prompt_rows, with_spellings
    from sdprep.prompt_stats import changed_knobs, compare, previews

    rows = prompt_rows(table)
    policies = [with_spellings(read_policy(file, table), table, rows) for file in files]
    shown = rows[:count]
    if len(policies) == 1:
        found = list(previews(shown, policies[0], seed, visit=visit))
        return {"prompts": found}, "\n\n".join(_prompt_text(prompt) for prompt in found)
    pairs = list(compare(shown, policies[0], policies[1], seed, visit=visit))
    knobs = changed_knobs(policies[0], policies[1])
    lines = [f"{knob}: {was} → {now}" for knob, (was, now) in knobs.items()]
    for pair in pairs:
        lines += [
            "",
            pair["id"],
            f"  1 {pair['first']['text']!r}",
            f"  2 {pair['second']['text']!r}",
        ]
    return {"prompts": pairs, "changed": knobs}, "\n".join(lines)


def _prompt_text(prompt: dict[str, Any]) -> str:
    facts = f"{prompt['tags']} tags, {prompt['tokens']} tokens, {prompt['chunks']} chunks"
    if prompt["dropped"]:
        facts += ", dropped"
    if prompt["removed"]:
        facts += f", {prompt['removed']} cut off"
    return f"{prompt['id']}  {facts}\n  {prompt['text']!r}"


def statistics(
    table: PhotoTable, files: list[Path | None], seed: int, to: Path | None
) -> tuple[dict[str, Any], str]:
    """Histograms under one policy or two."""
    from sdprep.prompt_rows import prompt_rows, with_spellings
    from sdprep.prompt_stats import statistics as count

    rows = prompt_rows(table)
    policies = [with_spellings(read_policy(file, table), table, rows) for file in files]
    counted = [count(rows, policy, seed) for policy in policies]
    if to:
        from sdprep.prompt_figure import draw_statistics

        draw_statistics(counted, to)
    text = "\n\n".join(_statistics_text(each) for each in counted)
    return (counted[0] if len(counted) == 1 else {"policies": counted}), text


def _statistics_text(found: dict[str, Any]) -> str:
    shares = "  ".join(f"{name} {share:.1%}" for name, share in found["shares"].items())
    lines = [
        f"{found['prompts']:,} prompts of {found['images']:,} images; "
        f"mean {found['means']['tags']:.1f} tags, {found['means']['tokens']:.1f} tokens",
        shares,
    ]
    for name in ("tokens", "tags"):
        lines += ["", f"{name} per prompt", *_bars(found[name])]
    if found["score_tags"]:
        scores = found["score_tags"].items()
        lines += ["", grid(["score tag", "share %"], [[name, 100 * s] for name, s in scores])]
    exposed = found["exposure"]
    lines.append(
        f"\n{exposed['distinct_tags']:,} tags, {exposed['never_shown']:,} of them never shown; "
        "least exposed:"
    )
    rows = [[t["name"], t["prompts"], t["offered"]] for t in exposed["least_exposed"][:5]]
    lines.append(grid(["tag", "shown", "offered"], rows))
    return "\n".join(lines)


def _bars(histogram: dict[str, int]) -> list[str]:
    most = max(histogram.values(), default=1)
    return [
        f"{value:>5} {'█' * round(_BAR * count / most):<{_BAR}} {count:,}"
        for value, count in histogram.items()
    ]
