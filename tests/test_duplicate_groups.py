"""Groups from edges, and which image of a group stays."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.duplicate_groups import (
    Quality,
    best_of_groups,
    gave_way,
    group_edges,
    links,
    members,
    refuse_large,
    set_links,
    unite_tags,
)
from sdprep.errors import UserError

EDGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=14)
IDS = [blake2b(bytes([n]), digest_size=16).hexdigest() for n in range(10)]


@settings(max_examples=80, deadline=None)
@given(edges=EDGES, more=EDGES, order=st.permutations(range(10)), data=st.data())
def test_groups_are_components_named_by_their_least_id(
    edges: list[tuple[int, int]],
    more: list[tuple[int, int]],
    order: list[int],
    data: st.DataObject,
) -> None:
    groups = group_edges(IDS, edges)
    reach = np.eye(10, dtype=bool)
    for one, two in edges:
        reach[one, two] = reach[two, one] = True
    for _ in range(4):
        reach = reach @ reach
    assert groups == [min(IDS[j] for j in np.flatnonzero(reach[i])) for i in range(10)]
    place = {row: new for new, row in enumerate(order)}
    shuffled = data.draw(st.permutations([(place[j], place[i]) for i, j in edges]))
    assert group_edges([IDS[row] for row in order], shuffled) == [groups[row] for row in order]
    grown = group_edges(IDS, [*links(groups), *more])
    assert grown == group_edges(IDS, edges + more)  # stored names stand for all earlier edges
    for rows in members(groups).values():
        assert len({grown[row] for row in rows}) == 1  # groups may merge, never split


def test_best_goes_by_pixels_then_bits_then_score_then_id() -> None:
    qualities = [
        Quality(100, 8.0, 1.0),
        Quality(200, 0.5, 0.0),
        Quality(200, 2.0, 3.0),
        Quality(200, 2.0, 5.0),
        Quality(200, 2.0, 5.0),
        Quality(999, 9.0, 9.0),
    ]
    ids = list("fedcba")
    live = [True] * 5 + [False]
    assert set(best_of_groups(ids, ["x"] * 6, qualities, live).values()) == {4}  # id b before c
    without = [True, True, True, False, False, False]
    assert best_of_groups(ids, ["x"] * 6, qualities, without) == {0: 2, 1: 2}
    assert best_of_groups(ids, ["x"] * 6, qualities, [False] * 6) == {}
    assert best_of_groups(ids, ids, qualities, live) == {}


def tag(name: str, source: str = "sidecar", category: str = "general") -> dict[str, Any]:
    return {"name": name, "category": category, "score": 1.0, "source": source}


def test_tags_are_united_once_without_what_is_of_the_file() -> None:
    ids = ["a", "b", "c"]
    tags = [
        [tag("cat"), tag("general", category="rating")],
        [tag("sofa"), tag("lowres", "attributes"), tag("explicit", category="rating")],
        [tag("cat", "wd"), tag("watermark", "owlv2"), tag("red")],
    ]
    better = {1: 0, 2: 0}
    united = unite_tags(ids, tags, better, [("a", "red")])
    assert united == {0: [*tags[0], tag("sofa")]}
    assert unite_tags(ids, [united[0], *tags[1:]], better, [("a", "red")]) == {}
    assert unite_tags(ids, [None, None, None], better) == {}


def test_who_gave_way_is_read_back_from_the_reasons() -> None:
    reasons = ["duplicate_of:c", None, None, "duplicate_of:gone", "by hand"]
    assert gave_way(list("abcde"), reasons) == {0: 2}
    assert gave_way([], []) == {}


def test_sets_join_parents_and_children_of_one_source() -> None:
    def at(source: str, key: str) -> list[dict[str, str]]:
        return [{"source": source, "key": key}]

    sources = [
        at("booru", "1/10.jpg"),
        at("booru", "1/11.jpg"),
        at("booru", "12.png"),
        at("other", "10.jpg"),
        at("other", "13.jpg"),
        None,
    ]
    parents = [None, "10", " 10 ", None, "99", "10"]
    groups = group_edges(list("abcdef"), set_links(parents, sources))
    assert groups == ["a", "a", "a", "d", "e", "f"]
    assert set_links([""] * 6, sources) == []


def test_a_large_group_is_refused_with_its_members() -> None:
    ids = [f"{n:032x}" for n in range(300)]
    groups = [ids[7]] * 101 + ids[101:]
    names = [f"photo {n}.jpg" for n in range(300)]
    refuse_large(ids, [ids[7]] * 100 + ids[100:], names)
    with pytest.raises(UserError, match="101 of 300") as caught:
        refuse_large(ids, groups, names)
    assert all(f"{ids[n]}  photo {n}.jpg" in str(caught.value) for n in range(101))
    assert "accept-large-groups" in caught.value.hint
