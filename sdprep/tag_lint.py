"""The linter of alias and implication lists, and the links that it lets through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sdprep.tag_lists import TagLink, TagList
from sdprep.tag_rules import cycle_members, resolve_chains

PROBLEMS = {
    "malformed": "the line cannot be read",
    "not_active": "retired or pending upstream",
    "self": "points to itself",
    "shortcut": "a typing aid that starts with /, no name",
    "conflict": "one alias of several tags",
    "antecedent_is_canonical": "the alias is a tag in its own right",
    "cycle": "its links lead back to it",
    "unknown_target": "the target is not in the vocabulary",
    "chain": "the target is itself an alias",
}
"""Kinds of problems; every kind but `chain`, which is followed to its end, leaves a link out."""


@dataclass(frozen=True)
class Problem:
    """One finding: what, where, and about which names."""

    kind: str
    line: int
    antecedent: str
    consequents: tuple[str, ...]
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "kind": self.kind,
            "line": self.line,
            "antecedent": self.antecedent,
            "consequents": list(self.consequents),
            "detail": self.detail or PROBLEMS[self.kind],
        }


@dataclass(frozen=True)
class LintReport:
    """All findings about one list, and what may be used of it."""

    source: TagList
    problems: tuple[Problem, ...]
    usable: tuple[TagLink, ...]

    def counts(self) -> dict[str, int]:
        """Number of problems by kind; kinds that were not found count 0."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in PROBLEMS}

    def aliases(self) -> dict[str, str]:
        """Other name → tag, chains followed."""
        return resolve_chains({link.antecedent: link.consequent for link in self.usable})

    def implications(self) -> dict[str, tuple[str, ...]]:
        """Tag → tags it directly entails."""
        graph: dict[str, list[str]] = {}
        for link in self.usable:
            graph.setdefault(link.antecedent, []).append(link.consequent)
        return {name: tuple(sorted(set(targets))) for name, targets in sorted(graph.items())}

    def spellings(self) -> dict[str, tuple[str, ...]]:
        """Tag → its other names, sorted: what a prompt may say instead."""
        other: dict[str, list[str]] = {}
        for alias, name in self.aliases().items():
            other.setdefault(name, []).append(alias)
        return {name: tuple(sorted(aliases)) for name, aliases in sorted(other.items())}

    def summary(self) -> str:
        """One line that says how many links are used and why the others are not."""
        total = len({(link.antecedent, link.consequent) for link in self.source.links})
        left_out = [
            f"{count} {kind}" for kind, count in self.counts().items() if count and kind != "chain"
        ]
        reasons = f"; left out: {', '.join(left_out)}" if left_out else ""
        return f"{self.source.path}: {len(self.usable)} of {total} links used{reasons}"

    def to_json(self) -> dict[str, Any]:
        """What `sdprep tags lint --json` prints."""
        return {
            "file": str(self.source.path),
            "format": self.source.format,
            "kind": self.source.kind,
            "rows": self.source.num_rows,
            "rows_with_links": self.source.num_rows_with_links,
            "antecedents": len({link.antecedent for link in self.source.links}),
            "usable": len(self.usable),
            "counts": self.counts(),
            "problems": [problem.to_json() for problem in self.problems],
        }


def lint(
    source: TagList,
    vocabulary: Collection[str] | None = None,
    *,
    keep_canonical: bool = True,
) -> LintReport:
    """Check a list and choose the links that are safe to use.

    One problem is reported per distinct antecedent (per distinct link for `chain`, `self`,
    `not_active` and `unknown_target`). For implications several targets and chains are ordinary.

    Args:
        source: the list.
        vocabulary: canonical names; by default those of the list itself, if it has any.
        keep_canonical: leave out links whose antecedent is a tag in its own right. A live list
            has few and retired ones (`hair_bun` to `single_hair_bun`): they would erase tags.
    """
    known = frozenset(vocabulary if vocabulary is not None else source.categories)
    problems = [Problem("malformed", line, "", (), detail) for line, detail in source.malformed]
    links: dict[tuple[str, str], TagLink] = {}
    for link in source.links:
        key = link.antecedent, link.consequent
        if link.status != "active":
            detail = f"status {link.status}"
            problems.append(Problem("not_active", link.line, key[0], key[1:], detail))
        elif key[0] == key[1]:
            problems.append(Problem("self", link.line, key[0], key[1:]))
        else:
            links.setdefault(key, link)
    targets: dict[str, list[TagLink]] = {}
    for link in links.values():
        targets.setdefault(link.antecedent, []).append(link)
    bad = _bad_antecedents(targets, source.kind == "aliases", known, problems)
    if not keep_canonical:
        reasons = [(problem.kind, problem.antecedent) for problem in problems]
        bad = {name for kind, name in reasons if kind in ("shortcut", "conflict")}
    cycle = cycle_members(
        {name: [to.consequent for to in to_all] for name, to_all in targets.items()}
    )
    usable = []
    for (old, new), link in links.items():
        on_cycle = old in cycle and cycle.get(new) == cycle[old]
        if on_cycle:
            problems.append(Problem("cycle", link.line, old, (new,)))
        if known and new not in known:
            problems.append(Problem("unknown_target", link.line, old, (new,)))
        elif not on_cycle and old not in bad:
            usable.append(link)
        if source.kind == "aliases" and new in targets:
            problems.append(Problem("chain", link.line, old, (new,)))
    order = {kind: place for place, kind in enumerate(PROBLEMS)}
    problems.sort(key=lambda problem: (order[problem.kind], problem.line, problem.antecedent))
    return LintReport(source, tuple(problems), tuple(usable))


def _bad_antecedents(
    targets: dict[str, list[TagLink]],
    is_alias_list: bool,
    known: frozenset[str],
    problems: list[Problem],
) -> set[str]:
    """Antecedents of which no link may be used; adds a problem for each reason."""
    bad: set[str] = set()
    for name, links in targets.items():
        consequents = tuple(sorted(link.consequent for link in links))
        reasons = []
        if name.startswith("/"):
            reasons.append("shortcut")
        if is_alias_list and len(links) > 1:
            reasons.append("conflict")
        if is_alias_list and name in known:
            reasons.append("antecedent_is_canonical")
        for kind in reasons:
            problems.append(Problem(kind, links[0].line, name, consequents))
            bad.add(name)
    return bad
