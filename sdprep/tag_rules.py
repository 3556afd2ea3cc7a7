"""Tags: one canonical spelling, and the rules that turn raw tags into final ones.

The order is always normalise, alias, implication, blacklist, deprecated. The words are the booru
community's: an alias is another name of a tag, an implication adds what a tag always entails.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from sdprep.clip_tokens import clean_text

ImplicationMode = Literal["add", "drop_ancestors", "off"]

_COMMAS = re.compile(r"[\s_]*,[\s_,]*")
_ESCAPED = re.compile(r"\\([()])")


@lru_cache(maxsize=200_000)
def normalise_tag(name: str) -> str:
    r"""The canonical spelling of a tag: NFC, lower case, trimmed, spaces as `_`, `\(` as `(`.

    The face `\(^o^)/` keeps its arm: what opens a name is an escape only where `\)` follows.
    An empty result means "no tag".
    """
    if "\\" in name and (not name.lstrip().startswith(r"\(") or r"\)" in name):
        name = _ESCAPED.sub(r"\1", name)
    # Lower case can take a letter apart (İ), so it comes before NFC.
    return "_".join(unicodedata.normalize("NFC", name.lower()).split())


def is_emoticon(name: str) -> bool:
    """Whether a name with `_` is a face, such as `^_^`, `(o)_(o)` or `||_||`.

    A face has two sides, each with a symbol in it and at most one letter or digit.
    """
    sides = name.split("_")
    letters = [sum(char.isalnum() for char in side) for side in sides]
    return len(sides) == 2 and all(
        count <= 1 and len(side) > count for side, count in zip(sides, letters, strict=True)
    )


@lru_cache(maxsize=200_000)
def spaced_tag(name: str) -> str:
    """A tag as prose: `_` to space, but for emoticons and names of up to 3 characters."""
    if len(name) <= 3 or is_emoticon(name):
        return name
    return " ".join(name.replace("_", " ").split()) or name


@lru_cache(maxsize=400_000)
def written_tag(name: str, spaces: bool) -> str:
    """A tag as prompts write it: text made plain, with `_` or spaces; empty if nothing is left.

    A comma would cut the tag in two, so commas become what joins its words.
    """
    text = clean_text(name)
    if "," in text:
        text = _COMMAS.sub(" ", text).strip()
    text = text.replace(" ", "_")
    return spaced_tag(text) if spaces else text


def cycle_members(links: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Names that lie on a cycle of a graph, each with the number of its cycle.

    Args:
        links: name → names it points to; a link to itself is a cycle too.
    Source: Tarjan 1972, strongly connected components, without recursion.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: dict[str, bool] = {}
    found: dict[str, int] = {}
    num_cycles = 0
    for root in sorted(links):
        if root in index:
            continue
        work = [(root, iter(sorted(links[root])))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack[root] = True
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    on_stack[target] = True
                    work.append((target, iter(sorted(links.get(target, ())))))
                    break
                if on_stack[target]:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    members, stack = stack[at:], stack[:at]
                    on_stack.update(dict.fromkeys(members, False))
                    if len(members) > 1 or node in links.get(node, ()):
                        found.update(dict.fromkeys(members, num_cycles))
                        num_cycles += 1
    return found


def without_cycles(links: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """The links of a graph that lie on no cycle, targets sorted."""
    cycle = cycle_members(links)
    kept = {}
    for name in sorted(links):
        on = cycle.get(name)
        targets = {to for to in links[name] if to != name and (on is None or cycle.get(to) != on)}
        if targets:
            kept[name] = tuple(sorted(targets))
    return kept


def resolve_chains(aliases: Mapping[str, str]) -> dict[str, str]:
    """Each alias with the last name of its chain; `aliases` must be free of cycles."""
    resolved = {}
    for alias, target in aliases.items():
        while target in aliases:
            target = aliases[target]
        resolved[alias] = target
    return resolved


@dataclass(frozen=True)
class TagRules:
    """What is done to every tag; built by `make_rules`, applied by the composition.

    Attributes:
        aliases: other name → final canonical name; no chains.
        implications: canonical name → everything it entails, directly or not; no cycles.
        mode: `add` what is entailed, `drop_ancestors` (keep only the most special), or `off`.
        blacklist: canonical names that never become tags.
        deprecated: canonical names that are retired; dropped like the blacklist, counted apart.
        categories: category of a canonical name, for tags that a rule brings in.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    implications: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mode: ImplicationMode = "add"
    blacklist: frozenset[str] = frozenset()
    deprecated: frozenset[str] = frozenset()
    categories: Mapping[str, str] = field(default_factory=dict)

    def canonical(self, name: str) -> str:
        """Normalise and alias one name; an empty result means "no tag"."""
        plain = normalise_tag(name)
        return self.aliases.get(plain, plain)


def make_rules(
    aliases: Mapping[str, str] | None = None,
    implications: Mapping[str, Collection[str]] | None = None,
    *,
    mode: ImplicationMode = "add",
    blacklist: Iterable[str] = (),
    deprecated: Iterable[str] = (),
    categories: Mapping[str, str] | None = None,
) -> TagRules:
    """Rules over canonical names, with chains followed and implications closed.

    Implications and lists are themselves read through the aliases, so that applying the rules
    twice changes nothing. Cycles are left out: the linter reports them.
    """
    plain = {normalise_tag(old): (normalise_tag(new),) for old, new in (aliases or {}).items()}
    names = resolve_chains({old: new[0] for old, new in without_cycles(plain).items()})

    def final(name: str) -> str:
        name = normalise_tag(name)
        return names.get(name, name)

    graph: dict[str, set[str]] = {}
    for name, entailed in (implications or {}).items():
        graph.setdefault(final(name), set()).update(final(other) for other in entailed)
    return TagRules(
        aliases=names,
        implications=_closure(without_cycles(graph)),
        mode=mode,
        blacklist=frozenset(final(name) for name in blacklist),
        deprecated=frozenset(final(name) for name in deprecated),
        categories=dict(categories or {}),
    )


def _closure(links: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Everything reachable from each name, sorted; a deep chain must not exhaust the stack."""
    reachable = {}
    for name in links:
        seen: set[str] = set()
        todo = list(links[name])
        while todo:
            target = todo.pop()
            if target not in seen:
                seen.add(target)
                todo.extend(links.get(target, ()))
        reachable[name] = tuple(sorted(seen))
    return reachable
