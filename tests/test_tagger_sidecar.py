"""Sidecar tagger: what the source wrote, with certainty 1."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sdprep.annotate import Sample
from sdprep.plugins import config_for
from sdprep.schema import SCORED_TAG, TAG_CATEGORIES

TAGGER = config_for("tagger", "sidecar")().build()


def tagged(*rows: dict) -> list[list[dict]]:
    batch = TAGGER.annotate([Sample(str(index), row) for index, row in enumerate(rows)])
    assert batch.schema == TAGGER.columns
    assert batch.schema.field("tags").type.value_type == SCORED_TAG
    return batch.column("tags").to_pylist()


def test_tags_keep_name_order_and_category():
    tags = [{"name": "1girl", "category": "general"}, {"name": "日本", "category": None}]
    assert tagged({"text": {"tags": tags}}) == [
        [
            {"name": "1girl", "p": 1.0, "category": "general"},
            {"name": "日本", "p": 1.0, "category": None},
        ]
    ]


def test_nothing_to_say_is_an_empty_list_not_null():
    rows = [{}, {"text": None}, {"text": {"tags": None}}, {"text": {"tags": []}}]
    assert tagged(*rows, {"text": {"tags": None, "caption": "a cat"}}) == [[]] * 5
    assert tagged() == []


def test_no_pixels_are_asked_for():
    assert not TAGGER.pixels.pixels
    assert not TAGGER.pixels.data


TAGS = st.lists(
    st.fixed_dictionaries({"name": st.text(), "category": st.sampled_from([None, *TAG_CATEGORIES])})
)


@given(st.lists(TAGS, max_size=5))
def test_every_tag_of_every_row_comes_through(lists):
    rows = tagged(*({"text": {"tags": tags}} for tags in lists))
    assert rows == [[tag | {"p": 1.0} for tag in tags] for tags in lists]
